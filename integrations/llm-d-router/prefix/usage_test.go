package prefix

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvindex.local/router/kvindexpb"
)

// foreseer answers that pod a holds 32 tokens and pod b none, and keeps what is reported.
func foreseer(told chan *kvindexpb.ReportUsageRequest, err error) *Scorer {
	held := []*kvindexpb.PodScore{{Pod: "a", Score: 2, Trust: exact, MatchedTokens: 32}, {Pod: "b", Trust: exact}}
	return New(fake{
		score: func(context.Context) (*kvindexpb.ScoreResponse, error) {
			return &kvindexpb.ScoreResponse{TotalBlocks: 4, Scores: held}, nil
		},
		told: func(request *kvindexpb.ReportUsageRequest) error {
			told <- request
			return err
		},
	}, Defaults())
}

func named(request string) Prompt {
	prompt := tokens
	prompt.RequestID = request
	return prompt
}

func TestWhatWasForeseenIsReportedWithWhatWasFound(t *testing.T) {
	told := make(chan *kvindexpb.ReportUsageRequest, 4)
	scorer := foreseer(told, nil)
	scorer.Scores(context.Background(), named("1"), []string{"a", "b"})
	scorer.Served("m", "1", "a", 16, 70)
	scorer.Served("m", "1", "a", 16, 70) // once
	scorer.Wait()
	if got := <-told; len(told) != 0 || got.GetModel() != "m" || got.GetPod() != "a" || got.GetPredictedTokens() != 32 ||
		got.GetCachedTokens() != 16 || got.GetPromptTokens() != 70 {
		t.Fatal(got, len(told))
	}
	if got := scorer.Counts()["usage: reported"]; got != 1 {
		t.Fatal(scorer.Counts())
	}
}

func TestWithoutAPredictionNothingIsReported(t *testing.T) {
	told := make(chan *kvindexpb.ReportUsageRequest, 4)
	scorer := foreseer(told, nil)
	ctx, pods := context.Background(), []string{"a", "b"}
	scorer.Scores(ctx, tokens, pods) // without a name
	scorer.Served("m", "", "a", 0, 70)
	scorer.Served("m", "stranger", "a", 0, 70)
	scorer.Scores(ctx, named("1"), pods)
	scorer.Served("m", "1", "c", 0, 70) // not a candidate
	scorer.Scores(ctx, named("2"), pods)
	scorer.Forget("2")
	scorer.Served("m", "2", "a", 0, 70)
	scorer.Wait()
	if len(told) != 0 || len(scorer.foreseen.requests) != 0 {
		t.Fatal(<-told, scorer.foreseen.requests)
	}
}

func TestAReportThatFailsIsCounted(t *testing.T) {
	scorer := foreseer(make(chan *kvindexpb.ReportUsageRequest, 1), status.Error(codes.NotFound, "pod"))
	scorer.Scores(context.Background(), named("1"), []string{"a"})
	scorer.Served("m", "1", "a", 0, 70)
	scorer.Wait()
	if got := scorer.Counts()["usage: NotFound"]; got != 1 {
		t.Fatal(scorer.Counts())
	}
}

func TestWhatIsForeseenIsBounded(t *testing.T) {
	scorer := foreseer(nil, nil)
	for number := range maxForeseen + 10 {
		scorer.Scores(context.Background(), named(fmt.Sprint(number)), []string{"a"})
	}
	if len(scorer.foreseen.requests) != maxForeseen || len(scorer.foreseen.order) != maxForeseen {
		t.Fatal(len(scorer.foreseen.requests), len(scorer.foreseen.order))
	}
	if _, known := scorer.foreseen.take("9", "a"); known {
		t.Fatal("the oldest should have given way")
	}
	if predicted, known := scorer.foreseen.take("10", "a"); !known || predicted != 32 {
		t.Fatal(predicted, known)
	}
}
