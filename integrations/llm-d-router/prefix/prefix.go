// Package prefix turns the index's answer into scores between 0 and 1 for a router, and remembers its picks there.
package prefix

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"math/bits"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvindex.local/router/kvindexpb"
)

// Index is what is asked; client.Client is one.
type Index interface {
	Score(context.Context, *kvindexpb.ScoreRequest) (*kvindexpb.ScoreResponse, error)
	RecordPlacement(context.Context, *kvindexpb.RecordPlacementRequest) (int, error)
	ReportUsage(context.Context, *kvindexpb.ReportUsageRequest) error
}

// Feature is a multimodal item: the engine's content hash and the placeholder range it covers, in tokens.
type Feature struct {
	Hash           string
	Offset, Length uint32
}

// Prompt of one request, in the first form that is filled: Tokens, Chat (an OpenAI chat-completions body), Text.
type Prompt struct {
	// Names the request from Scores to Served; without it no usage is reported.
	RequestID string
	Model     string
	Tokens    []uint32
	Chat      string
	Text      string
	CacheSalt string
	Features  []Feature
}

func (p Prompt) empty() bool { return len(p.Tokens) == 0 && p.Chat == "" && p.Text == "" }

// Settings of a Scorer.
type Settings struct {
	// Longest wait for scores; afterwards the router decides without them.
	Timeout time.Duration
	// Longest wait of a placement or a report, which nobody waits for.
	PlacementTimeout time.Duration
	// What a match is worth while the pod's trust is STALE, 0 to 1.
	StaleFactor float64
	// Placements and reports under way at most; more are dropped and counted.
	MaxPlacements int
}

// Defaults are for a router on the request's path.
func Defaults() Settings {
	return Settings{Timeout: 50 * time.Millisecond, PlacementTimeout: time.Second, StaleFactor: 0.5, MaxPlacements: 256}
}

// Check names the setting that makes no sense.
func (s Settings) Check() error {
	switch {
	case s.Timeout <= 0:
		return errors.New("timeout: must be above 0")
	case s.PlacementTimeout <= 0:
		return errors.New("placementTimeout: must be above 0")
	case !(s.StaleFactor >= 0 && s.StaleFactor <= 1):
		return errors.New("staleFactor: must be between 0 and 1")
	case s.MaxPlacements < 1:
		return errors.New("maxPlacements: must be above 0")
	}
	return nil
}

// Scorer is safe for concurrent use.
type Scorer struct {
	index    Index
	settings Settings
	permits  chan struct{}
	pending  sync.WaitGroup
	foreseen foreseen

	mutex  sync.Mutex
	counts map[string]uint64
}

// New makes a Scorer of settings that were checked.
func New(index Index, settings Settings) *Scorer {
	return &Scorer{
		index:    index,
		settings: settings,
		permits:  make(chan struct{}, settings.MaxPlacements),
		counts:   map[string]uint64{},
	}
}

// Scores of the pods, 0 to 1; nil when the index says nothing, which Counts tells by reason.
func (s *Scorer) Scores(ctx context.Context, prompt Prompt, pods []string) map[string]float64 {
	if len(pods) == 0 {
		return nil
	}
	if prompt.empty() {
		s.count("score: no prompt that can be asked for", nil)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.settings.Timeout)
	defer cancel()
	answer, err := s.index.Score(ctx, scoreRequest(prompt, pods))
	if err != nil {
		s.count("score: "+reason(err), err)
		return nil
	}
	s.foreseen.add(prompt.RequestID, answer)
	scores, known := Normalise(answer, s.settings.StaleFactor)
	if !known {
		s.count("score: nothing known of any candidate", nil)
		return nil
	}
	s.count("score: answered", nil)
	return scores
}

// Placed tells the index in the background where the prompt is sent. It never blocks.
func (s *Scorer) Placed(prompt Prompt, pod string) {
	if prompt.empty() {
		return
	}
	s.behind("placement", func(ctx context.Context) {
		recorded, err := s.index.RecordPlacement(ctx, placementRequest(prompt, pod))
		switch {
		case err == nil:
			s.count("placement: recorded", nil)
		case recorded > 0:
			s.count("placement: missed by a replica", err)
		default:
			s.count("placement: "+reason(err), err)
		}
	})
}

// Served tells the index in the background how many tokens the pod's engine found in its cache, beside what was
// predicted of it. It never blocks, and does nothing for a request of which nothing was predicted.
func (s *Scorer) Served(model, request, pod string, cached, prompt uint32) {
	predicted, known := s.foreseen.take(request, pod)
	if !known {
		return
	}
	s.behind("usage", func(ctx context.Context) {
		told := &kvindexpb.ReportUsageRequest{
			Model: model, Pod: pod, PredictedTokens: predicted, CachedTokens: cached, PromptTokens: prompt,
		}
		if err := s.index.ReportUsage(ctx, told); err != nil {
			s.count("usage: "+reason(err), err)
			return
		}
		s.count("usage: reported", nil)
	})
}

// Forget what was predicted of a request whose usage will not be told, or tells something else.
func (s *Scorer) Forget(request string) { s.foreseen.take(request, "") }

// behind does what nobody waits for, within bounds of time and number.
func (s *Scorer) behind(what string, do func(context.Context)) {
	select {
	case s.permits <- struct{}{}:
	default:
		s.count(what+": dropped, too many under way", nil)
		return
	}
	s.pending.Add(1)
	go func() {
		defer s.pending.Done()
		defer func() { <-s.permits }()
		// Not the request's context: that ends with the request.
		ctx, cancel := context.WithTimeout(context.Background(), s.settings.PlacementTimeout)
		defer cancel()
		do(ctx)
	}()
}

// Wait returns when no placement and no report is under way any more.
func (s *Scorer) Wait() { s.pending.Wait() }

// Counts of what became of calls, by reason.
func (s *Scorer) Counts() map[string]uint64 {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	copied := make(map[string]uint64, len(s.counts))
	for what, count := range s.counts {
		copied[what] = count
	}
	return copied
}

// count logs a failure at its 1st, 2nd, 4th, 8th... time, so that a broken index does not fill the log.
func (s *Scorer) count(what string, err error) {
	s.mutex.Lock()
	s.counts[what]++
	count := s.counts[what]
	s.mutex.Unlock()
	if err != nil && bits.OnesCount64(count) == 1 {
		slog.Warn("kvindex", "what", what, "times", count, "error", err)
	}
}

// Normalise divides by the prompt's blocks, so that 1 is the whole prompt on the fastest tier. False when the answer
// holds nothing to decide by: no full block, or no candidate of which anything is known.
//
// A COLD pod is not an empty one: it gets the mean of the candidates that are known, so that it neither draws nor
// repels. What was placed on it counts if that is more. A STALE pod's match may be wrong and counts by staleFactor.
// PARTIAL is sound as far as it goes and counts as it is, like EXACT.
func Normalise(answer *kvindexpb.ScoreResponse, staleFactor float64) (map[string]float64, bool) {
	if answer.GetTotalBlocks() == 0 {
		return nil, false
	}
	scores := make(map[string]float64, len(answer.GetScores()))
	var cold []string
	sum, known, placed := 0.0, 0, false
	for _, each := range answer.GetScores() {
		share := clip(each.GetScore() / float64(answer.GetTotalBlocks()))
		switch each.GetTrust() {
		case kvindexpb.Trust_TRUST_EXACT, kvindexpb.Trust_TRUST_PARTIAL:
		case kvindexpb.Trust_TRUST_STALE:
			share *= staleFactor
		default: // COLD, and any level that is newer than this code
			cold = append(cold, each.GetPod())
			scores[each.GetPod()] = share
			placed = placed || share > 0
			continue
		}
		scores[each.GetPod()] = share
		sum, known = sum+share, known+1
	}
	if known == 0 {
		return scores, placed
	}
	for _, pod := range cold {
		scores[pod] = math.Max(scores[pod], sum/float64(known))
	}
	return scores, true
}

func clip(share float64) float64 {
	if math.IsNaN(share) {
		return 0
	}
	return math.Min(1, math.Max(0, share))
}

func reason(err error) string {
	if joined, ok := err.(interface{ Unwrap() []error }); ok && len(joined.Unwrap()) > 0 {
		err = joined.Unwrap()[0]
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return codes.DeadlineExceeded.String()
	}
	return status.Code(err).String()
}

func scoreRequest(prompt Prompt, pods []string) *kvindexpb.ScoreRequest {
	request := &kvindexpb.ScoreRequest{
		Model: prompt.Model, Pods: pods, CacheSalt: prompt.CacheSalt, MmFeatures: features(prompt.Features),
	}
	switch {
	case len(prompt.Tokens) > 0:
		request.Input = &kvindexpb.ScoreRequest_Tokens{Tokens: &kvindexpb.Tokens{Ids: prompt.Tokens}}
	case prompt.Chat != "":
		request.Input = &kvindexpb.ScoreRequest_Chat{Chat: prompt.Chat}
	default:
		request.Input = &kvindexpb.ScoreRequest_Prompt{Prompt: prompt.Text}
	}
	return request
}

func placementRequest(prompt Prompt, pod string) *kvindexpb.RecordPlacementRequest {
	request := &kvindexpb.RecordPlacementRequest{
		Model: prompt.Model, Pod: pod, CacheSalt: prompt.CacheSalt, MmFeatures: features(prompt.Features),
	}
	switch {
	case len(prompt.Tokens) > 0:
		request.Input = &kvindexpb.RecordPlacementRequest_Tokens{Tokens: &kvindexpb.Tokens{Ids: prompt.Tokens}}
	case prompt.Chat != "":
		request.Input = &kvindexpb.RecordPlacementRequest_Chat{Chat: prompt.Chat}
	default:
		request.Input = &kvindexpb.RecordPlacementRequest_Prompt{Prompt: prompt.Text}
	}
	return request
}

func features(all []Feature) []*kvindexpb.MmFeature {
	var sent []*kvindexpb.MmFeature
	for _, each := range all {
		sent = append(sent, &kvindexpb.MmFeature{Hash: each.Hash, Offset: each.Offset, Length: each.Length})
	}
	return sent
}
