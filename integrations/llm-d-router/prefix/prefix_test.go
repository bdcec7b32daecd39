package prefix

import (
	"context"
	"math"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvindex.local/router/kvindexpb"
)

const (
	cold    = kvindexpb.Trust_TRUST_COLD
	partial = kvindexpb.Trust_TRUST_PARTIAL
	exact   = kvindexpb.Trust_TRUST_EXACT
	stale   = kvindexpb.Trust_TRUST_STALE
)

func pod(name string, score float64, trust kvindexpb.Trust) *kvindexpb.PodScore {
	return &kvindexpb.PodScore{Pod: name, Score: score, Trust: trust}
}

func TestNormalise(t *testing.T) {
	for name, each := range map[string]struct {
		blocks uint32
		pods   []*kvindexpb.PodScore
		want   map[string]float64
		known  bool
	}{
		"shares of the prompt": {
			10, []*kvindexpb.PodScore{pod("a", 10, exact), pod("b", 4, partial), pod("c", 0, exact)},
			map[string]float64{"a": 1, "b": 0.4, "c": 0}, true,
		},
		"a cold pod gets the mean": {
			10, []*kvindexpb.PodScore{pod("a", 10, exact), pod("b", 0, exact), pod("c", 0, cold)},
			map[string]float64{"a": 1, "b": 0, "c": 0.5}, true,
		},
		"or what was placed on it": {
			10, []*kvindexpb.PodScore{pod("a", 2, exact), pod("b", 9, cold)},
			map[string]float64{"a": 0.2, "b": 0.9}, true,
		},
		"a stale match counts half": {
			10, []*kvindexpb.PodScore{pod("a", 8, stale)}, map[string]float64{"a": 0.4}, true,
		},
		"an unknown trust is cold": {
			10, []*kvindexpb.PodScore{pod("a", 4, exact), pod("b", 0, 99)},
			map[string]float64{"a": 0.4, "b": 0.4}, true,
		},
		"nothing known": {
			10, []*kvindexpb.PodScore{pod("a", 0, cold)}, map[string]float64{"a": 0}, false,
		},
		"placements alone are known": {
			10, []*kvindexpb.PodScore{pod("a", 5, cold), pod("b", 0, cold)}, map[string]float64{"a": 0.5, "b": 0}, true,
		},
		"no full block": {0, []*kvindexpb.PodScore{pod("a", 0, exact)}, nil, false},
		"weights above one and nonsense": {
			2, []*kvindexpb.PodScore{pod("a", 3, exact), pod("b", math.NaN(), exact), pod("c", -1, exact)},
			map[string]float64{"a": 1, "b": 0, "c": 0}, true,
		},
	} {
		got, known := Normalise(&kvindexpb.ScoreResponse{TotalBlocks: each.blocks, Scores: each.pods}, 0.5)
		if known != each.known || !reflect.DeepEqual(got, each.want) {
			t.Errorf("%s: %v %t", name, got, known)
		}
	}
}

type fake struct {
	score func(context.Context) (*kvindexpb.ScoreResponse, error)
	place func(context.Context, *kvindexpb.RecordPlacementRequest) (int, error)
	told  func(*kvindexpb.ReportUsageRequest) error
}

func (f fake) Score(ctx context.Context, _ *kvindexpb.ScoreRequest) (*kvindexpb.ScoreResponse, error) {
	return f.score(ctx)
}

func (f fake) RecordPlacement(ctx context.Context, request *kvindexpb.RecordPlacementRequest) (int, error) {
	return f.place(ctx, request)
}

func (f fake) ReportUsage(_ context.Context, request *kvindexpb.ReportUsageRequest) error {
	return f.told(request)
}

var tokens = Prompt{Model: "m", Tokens: []uint32{1}}

func TestASilentIndexCostsTheTimeoutAndIsCounted(t *testing.T) {
	settings := Defaults()
	settings.Timeout = 20 * time.Millisecond
	scorer := New(fake{score: func(ctx context.Context) (*kvindexpb.ScoreResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}, settings)
	began := time.Now()
	if scores := scorer.Scores(context.Background(), tokens, []string{"a"}); scores != nil {
		t.Fatal(scores)
	}
	if took := time.Since(began); took < settings.Timeout || took > 10*time.Second {
		t.Fatal(took)
	}
	if got := scorer.Counts()["score: DeadlineExceeded"]; got != 1 {
		t.Fatal(scorer.Counts())
	}
}

func TestNoSignalIsNilAndCountedByReason(t *testing.T) {
	answers := make(chan error, 1)
	scorer := New(fake{score: func(context.Context) (*kvindexpb.ScoreResponse, error) {
		return &kvindexpb.ScoreResponse{}, <-answers
	}}, Defaults())
	for what, err := range map[string]error{
		"score: Unavailable":                    status.Error(codes.Unavailable, "not ready"),
		"score: NotFound":                       status.Error(codes.NotFound, "model"),
		"score: nothing known of any candidate": nil,
	} {
		answers <- err
		if scores := scorer.Scores(context.Background(), tokens, []string{"a"}); scores != nil || scorer.Counts()[what] != 1 {
			t.Error(what, scores, scorer.Counts())
		}
	}
	if scorer.Scores(context.Background(), Prompt{Model: "m"}, []string{"a"}) != nil ||
		scorer.Counts()["score: no prompt that can be asked for"] != 1 {
		t.Error(scorer.Counts())
	}
}

func TestPlacementsAreBoundedAndNeverBlock(t *testing.T) {
	settings := Defaults()
	settings.MaxPlacements = 2
	release := make(chan struct{})
	scorer := New(fake{place: func(context.Context, *kvindexpb.RecordPlacementRequest) (int, error) {
		<-release
		return 1, nil
	}}, settings)
	for range 5 {
		scorer.Placed(tokens, "a")
	}
	if got := scorer.Counts()["placement: dropped, too many under way"]; got != 3 {
		t.Fatal(scorer.Counts())
	}
	close(release)
	scorer.Wait()
	if got := scorer.Counts()["placement: recorded"]; got != 2 {
		t.Fatal(scorer.Counts())
	}
}

func TestARequestCarriesTheWholeIdentity(t *testing.T) {
	prompt := Prompt{Model: "m", Tokens: []uint32{1, 2}, CacheSalt: "s", Features: []Feature{{"h", 0, 2}}}
	score, placement := scoreRequest(prompt, []string{"a"}), placementRequest(prompt, "a")
	if score.GetModel() != "m" || !reflect.DeepEqual(score.GetTokens().GetIds(), prompt.Tokens) ||
		score.GetCacheSalt() != "s" || score.GetMmFeatures()[0].GetLength() != 2 || score.GetPods()[0] != "a" {
		t.Error(score)
	}
	if placement.GetModel() != "m" || !reflect.DeepEqual(placement.GetTokens().GetIds(), prompt.Tokens) ||
		placement.GetCacheSalt() != "s" || placement.GetMmFeatures()[0].GetHash() != "h" || placement.GetPod() != "a" {
		t.Error(placement)
	}
	if got := scoreRequest(Prompt{Chat: "{}", Text: "t"}, nil).GetChat(); got != "{}" {
		t.Error(got)
	}
	if got := placementRequest(Prompt{Text: "t"}, "a").GetPrompt(); got != "t" {
		t.Error(got)
	}
}

func TestSettingsWithoutSenseAreNamed(t *testing.T) {
	for _, change := range []func(*Settings){
		func(s *Settings) { s.Timeout = 0 },
		func(s *Settings) { s.PlacementTimeout = -1 },
		func(s *Settings) { s.StaleFactor = math.NaN() },
		func(s *Settings) { s.MaxPlacements = 0 },
	} {
		settings := Defaults()
		change(&settings)
		if settings.Check() == nil {
			t.Error(settings)
		}
	}
}
