package plugin

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/datalayer"
	fwkplugin "github.com/llm-d/llm-d-router/pkg/epp/framework/interface/plugin"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/requestcontrol"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/requesthandling"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/scheduling"
)

type endpoint struct{ metadata datalayer.EndpointMetadata }

func (e *endpoint) GetMetadata() *datalayer.EndpointMetadata { return &e.metadata }

type handle struct{ ctx context.Context }

func (h handle) Context() context.Context { return h.ctx }

var (
	first  scheduling.Endpoint = &endpoint{datalayer.EndpointMetadata{Address: "10.0.0.1", Port: "8000"}}
	second scheduling.Endpoint = &endpoint{datalayer.EndpointMetadata{Address: "10.0.0.2", Port: "8000"}}
)

func build(t *testing.T, parameters string) (*Scorer, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	decoder := json.NewDecoder(strings.NewReader(parameters))
	decoder.DisallowUnknownFields()
	made, err := fwkplugin.Registry[Type]("kv", decoder, handle{ctx})
	if err != nil {
		return nil, err
	}
	return made.(*Scorer), nil
}

func TestMain(m *testing.M) {
	Register()
	os.Exit(m.Run())
}

// server starts the real kvindex-server with two pods of model m, and tells where it answers gRPC and has its metrics;
// ROUTER_TEST_PYTHON has it installed.
func server(t *testing.T) (string, string) {
	t.Helper()
	python := os.Getenv("ROUTER_TEST_PYTHON")
	if python == "" {
		t.Skip("ROUTER_TEST_PYTHON is not set: no server to ask")
	}
	type object = map[string]any
	var pods []object
	for _, pod := range []string{podOf(first), podOf(second)} {
		// Nobody publishes there.
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_ = silent.Close()
		pods = append(pods, object{"pod": pod, "model": "m", "endpoint": "tcp://" + silent.Addr().String()})
	}
	config, _ := json.Marshal(object{
		"models": []object{{"name": "m", "block_size": 16}}, "pods": pods,
		"server": object{"ready_timeout_seconds": 0.1},
	})
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	command := exec.Command(python, "-m", "kvindex_server", "serve", "--config", file,
		"--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
	command.Stderr = os.Stderr
	output, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	})
	line, err := bufio.NewReader(output).ReadString('\n')
	found := regexp.MustCompile(`grpc=(\S+) metrics=(\S+)`).FindStringSubmatch(line)
	if err != nil || found == nil {
		t.Fatal(line, err)
	}
	return found[1], found[2]
}

func tokenized(count int) *scheduling.InferenceRequest {
	ids := make([]uint32, count)
	for number := range ids {
		ids[number] = uint32(number)
	}
	return &scheduling.InferenceRequest{TargetModel: "m", Body: &requesthandling.InferenceRequestBody{
		TokenizedPrompt: &requesthandling.TokenizedPrompt{PerPromptTokens: [][]uint32{ids}},
	}}
}

func picked(target scheduling.Endpoint) *scheduling.SchedulingResult {
	return &scheduling.SchedulingResult{
		PrimaryProfileName: "default",
		ProfileResults:     map[string]*scheduling.ProfileRunResult{"default": {TargetEndpoints: []scheduling.Endpoint{target}}},
	}
}

func TestAgainstTheRealServer(t *testing.T) {
	index, _ := server(t)
	scorer, err := build(t, fmt.Sprintf(`{"endpoints": [%q], "timeout": "10s", "placementTimeout": "10s"}`, index))
	if err != nil {
		t.Fatal(err)
	}
	ctx, endpoints := context.Background(), []scheduling.Endpoint{first, second}
	ends := time.Now().Add(20 * time.Second)
	for scorer.scorer.Counts()["score: nothing known of any candidate"] == 0 { // until it is ready
		if scored := scorer.Score(ctx, tokenized(64), endpoints); len(scored) != 0 {
			t.Fatal(scored)
		}
		if time.Now().After(ends) {
			t.Fatal(scorer.DumpState())
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := scorer.PreRequest(ctx, tokenized(64), picked(second)); err != nil {
		t.Fatal(err)
	}
	scorer.scorer.Wait()
	scored := scorer.Score(ctx, tokenized(128), endpoints)
	if len(scored) != 2 || scored[second] != 0.5 || scored[first] != 0 {
		t.Fatal(scored, scorer.DumpState())
	}
	counts := scorer.DumpState().(map[string]uint64)
	if counts["score: answered"] != 1 || counts["placement: recorded"] != 1 {
		t.Fatal(counts)
	}
}

func metricsOf(t *testing.T, address string) string {
	t.Helper()
	answer, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestWhatTheEngineFoundIsReportedToTheRealServer(t *testing.T) {
	index, metrics := server(t)
	scorer, err := build(t, fmt.Sprintf(`{"endpoints": [%q], "timeout": "10s", "placementTimeout": "10s"}`, index))
	if err != nil {
		t.Fatal(err)
	}
	ctx, request, ends := context.Background(), tokenized(64), time.Now().Add(20*time.Second)
	for request.RequestID = "first"; scorer.scorer.Counts()["score: nothing known of any candidate"] == 0; {
		scorer.Score(ctx, request, []scheduling.Endpoint{first, second})
		if time.Now().After(ends) {
			t.Fatal(scorer.DumpState())
		}
		time.Sleep(20 * time.Millisecond)
	}
	found := func(cached int) *requestcontrol.Response {
		details := &requesthandling.PromptTokenDetails{CachedTokens: cached}
		return &requestcontrol.Response{EndOfStream: true, Usage: requesthandling.Usage{PromptTokens: 64, PromptTokenDetails: details}}
	}
	scorer.ResponseBody(ctx, request, &requestcontrol.Response{}, second.GetMetadata()) // a chunk on the way
	scorer.ResponseBody(ctx, request, found(48), second.GetMetadata())
	scorer.ResponseBody(ctx, request, found(48), second.GetMetadata())
	scorer.scorer.Wait()
	if counts := scorer.scorer.Counts(); counts["usage: reported"] != 1 {
		t.Fatal(counts)
	}
	if text := metricsOf(t, metrics); !strings.Contains(text, `kvindex_usage_error_tokens_sum{direction="under",model="m"} 48.0`) {
		t.Fatal(text)
	}
	for name, change := range map[string]func(*scheduling.InferenceRequest) *requestcontrol.Response{
		"an engine that does not say": func(*scheduling.InferenceRequest) *requestcontrol.Response {
			return &requestcontrol.Response{EndOfStream: true, Usage: requesthandling.Usage{PromptTokens: 64}}
		},
		"a prefill elsewhere": func(each *scheduling.InferenceRequest) *requestcontrol.Response {
			result := picked(second)
			result.ProfileResults[prefillProfile] = picked(first).ProfileResults["default"]
			_ = scorer.PreRequest(ctx, each, result)
			return found(48)
		},
	} {
		each := tokenized(64)
		each.RequestID = name
		scorer.Score(ctx, each, []scheduling.Endpoint{first, second})
		scorer.ResponseBody(ctx, each, change(each), second.GetMetadata())
		scorer.ResponseBody(ctx, each, found(48), second.GetMetadata())
		scorer.scorer.Wait()
		if counts := scorer.scorer.Counts(); counts["usage: reported"] != 1 {
			t.Error(name, counts)
		}
	}
}

func TestADeadIndexLeavesTheDecisionToOthers(t *testing.T) {
	scorer, err := build(t, `{"endpoints": ["127.0.0.1:1"], "timeout": "5s"}`)
	if err != nil {
		t.Fatal(err)
	}
	if scored := scorer.Score(context.Background(), tokenized(64), []scheduling.Endpoint{first}); len(scored) != 0 {
		t.Fatal(scored)
	}
	if err := scorer.PreRequest(context.Background(), tokenized(64), picked(first)); err != nil {
		t.Fatal(err)
	}
	scorer.scorer.Wait()
	counts := scorer.DumpState().(map[string]uint64)
	if counts["score: Unavailable"] != 1 || counts["placement: Unavailable"] != 1 {
		t.Fatal(counts)
	}
}

func TestPromptOf(t *testing.T) {
	body := func(change func(*requesthandling.InferenceRequestBody)) *scheduling.InferenceRequest {
		made := &requesthandling.InferenceRequestBody{}
		change(made)
		return &scheduling.InferenceRequest{TargetModel: "m", Body: made}
	}
	image := tokenized(4)
	image.Body.TokenizedPrompt.MultiModalFeatures = []requesthandling.MultiModalFeature{{Hash: "h", Offset: 1, Length: 2}}
	if got := promptOf(image); len(got.Tokens) != 4 || got.Features[0].Hash != "h" || got.Features[0].Length != 2 {
		t.Error(got)
	}
	chat := promptOf(body(func(b *requesthandling.InferenceRequestBody) {
		b.ChatCompletions = &requesthandling.ChatCompletionsRequest{CacheSalt: "s"}
		b.Payload = requesthandling.PayloadMap{"messages": []any{map[string]any{"role": "user", "content": "hi"}}}
	}))
	if chat.Chat != `{"messages":[{"content":"hi","role":"user"}]}` || chat.CacheSalt != "s" || chat.Model != "m" {
		t.Error(chat)
	}
	completion := func(prompt requesthandling.Prompt) func(*requesthandling.InferenceRequestBody) {
		return func(b *requesthandling.InferenceRequestBody) {
			b.Completions = &requesthandling.CompletionsRequest{Prompt: prompt}
		}
	}
	if got := promptOf(body(completion(requesthandling.Prompt{Raw: "text"}))); got.Text != "text" {
		t.Error(got)
	}
	if got := promptOf(body(completion(requesthandling.Prompt{TokenIDs: []uint32{7}}))); len(got.Tokens) != 1 {
		t.Error(got)
	}
	if got := promptOf(body(completion(requesthandling.Prompt{Strings: []string{"a", "b"}}))); got.Text != "" {
		t.Error("two prompts became one", got)
	}
	if got := promptOf(nil); got.Model != "" {
		t.Error(got)
	}
}

func TestParameters(t *testing.T) {
	for parameters, named := range map[string]string{
		`{}`: "endpoints",
		`{"endpoints": ["a:1"], "timeout": "soon"}`: "timeout",
		`{"endpoints": ["a:1"], "timeout": "0s"}`:   "timeout",
		`{"endpoints": ["a:1"], "staleFactor": 2}`:  "staleFactor",
		`{"endpoints": ["a:1"], "tokenFile": "/t"}`: "token",
		`{"endpoints": ["a:1"], "caFile": "/none"}`: "caFile",
		`{"endpoints": ["a:1"], "keyFile": "/k"}`:   "certFile",
		`{"endpoint": "a:1"}`:                       "endpoint",
	} {
		if _, err := build(t, parameters); err == nil || !strings.Contains(err.Error(), named) {
			t.Errorf("%s: %v", parameters, err)
		}
	}
	made, err := build(t, `{"endpoints": ["a:1"], "recordPlacements": false}`)
	if err != nil || made.record || made.TypedName() != (fwkplugin.TypedName{Type: Type, Name: "kv"}) {
		t.Fatal(made, err)
	}
	if err := made.PreRequest(context.Background(), tokenized(64), picked(first)); err != nil {
		t.Fatal(err)
	}
	made.scorer.Wait()
	if counts := made.DumpState().(map[string]uint64); len(counts) != 0 {
		t.Fatal("it recorded although it was told not to", counts)
	}
}
