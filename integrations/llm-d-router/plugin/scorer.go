// Package plugin is a scorer of llm-d-router that asks kvindex-server, and tells it where each request was sent.
package plugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/datalayer"
	fwkplugin "github.com/llm-d/llm-d-router/pkg/epp/framework/interface/plugin"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/requestcontrol"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/requesthandling"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/scheduling"

	"kvindex.local/router/client"
	"kvindex.local/router/prefix"
)

// Type is the plugin's type in an EndpointPickerConfig.
const Type = "kvindex-prefix-scorer"

// prefillProfile is the name that disaggregated configurations give the profile whose pod computes the prompt.
const prefillProfile = "prefill"

var (
	_ scheduling.Scorer                    = (*Scorer)(nil)
	_ requestcontrol.PreRequest            = (*Scorer)(nil)
	_ requestcontrol.ResponseBodyProcessor = (*Scorer)(nil)
	_ fwkplugin.StateDumper                = (*Scorer)(nil)
)

// Register makes the type known; to be called before the router's runner starts.
func Register() { fwkplugin.Register(Type, Factory) }

// parameters as they stand in the configuration; what is absent keeps its default.
type parameters struct {
	Endpoints        []string `json:"endpoints"`
	Timeout          string   `json:"timeout"`
	HedgeAfter       string   `json:"hedgeAfter"`
	PlacementTimeout string   `json:"placementTimeout"`
	RecordPlacements *bool    `json:"recordPlacements"`
	ReportUsage      *bool    `json:"reportUsage"`
	StaleFactor      *float64 `json:"staleFactor"`
	MaxPlacements    int      `json:"maxPlacements"`
	CAFile           string   `json:"caFile"`
	CertFile         string   `json:"certFile"`
	KeyFile          string   `json:"keyFile"`
	TokenFile        string   `json:"tokenFile"`
}

// Factory makes a Scorer of its parameters; every error names the parameter.
func Factory(name string, decoder *json.Decoder, handle fwkplugin.Handle) (fwkplugin.Plugin, error) {
	var given parameters
	if decoder != nil {
		if err := decoder.Decode(&given); err != nil {
			return nil, fmt.Errorf("%s: parameters: %w", Type, err)
		}
	}
	options, settings, err := given.read()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", Type, err)
	}
	index, err := client.New(options)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", Type, err)
	}
	if handle != nil {
		context.AfterFunc(handle.Context(), func() { _ = index.Close() })
	}
	record := given.RecordPlacements == nil || *given.RecordPlacements
	report := given.ReportUsage == nil || *given.ReportUsage
	return &Scorer{name: name, scorer: prefix.New(index, settings), record: record, report: report}, nil
}

func (p parameters) read() (client.Options, prefix.Settings, error) {
	options, settings := client.Options{Endpoints: p.Endpoints}, prefix.Defaults()
	for _, each := range []struct {
		name, text string
		into       *time.Duration
	}{
		{"timeout", p.Timeout, &settings.Timeout},
		{"hedgeAfter", p.HedgeAfter, &options.HedgeAfter},
		{"placementTimeout", p.PlacementTimeout, &settings.PlacementTimeout},
	} {
		if each.text == "" {
			continue
		}
		read, err := time.ParseDuration(each.text)
		if err != nil {
			return options, settings, fmt.Errorf("%s: is no duration such as 50ms", each.name)
		}
		*each.into = read
	}
	if p.StaleFactor != nil {
		settings.StaleFactor = *p.StaleFactor
	}
	if p.MaxPlacements != 0 {
		settings.MaxPlacements = p.MaxPlacements
	}
	if err := settings.Check(); err != nil {
		return options, settings, err
	}
	var err error
	if options.TLS, err = p.tls(); err != nil {
		return options, settings, err
	}
	if p.TokenFile != "" {
		// Read for every call: projected tokens are rotated.
		options.Token = func() (string, error) {
			token, err := os.ReadFile(p.TokenFile)
			return strings.TrimSpace(string(token)), err
		}
	}
	return options, settings, nil
}

func (p parameters) tls() (*tls.Config, error) {
	if p.CAFile == "" && p.CertFile == "" && p.KeyFile == "" {
		return nil, nil
	}
	if (p.CertFile == "") != (p.KeyFile == "") {
		return nil, errors.New("certFile: goes with keyFile")
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if p.CAFile != "" {
		pem, err := os.ReadFile(p.CAFile)
		if err != nil {
			return nil, fmt.Errorf("caFile: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("caFile: holds no certificate")
		}
	}
	if p.CertFile != "" {
		if _, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile); err != nil {
			return nil, fmt.Errorf("certFile: %w", err)
		}
		// Read for every handshake: certificates are rotated.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
			return &pair, err
		}
	}
	return config, nil
}

// Scorer scores endpoints by how much of the prompt their caches hold already.
type Scorer struct {
	name   string
	scorer *prefix.Scorer
	record bool
	report bool
}

// TypedName of this instance.
func (s *Scorer) TypedName() fwkplugin.TypedName {
	return fwkplugin.TypedName{Type: Type, Name: s.name}
}

// Category is affinity: the same prompt scores the same pods.
func (s *Scorer) Category() scheduling.ScorerCategory { return scheduling.Affinity }

// DumpState counts what became of calls; it holds nothing of any request.
func (s *Scorer) DumpState() any { return s.scorer.Counts() }

// Score is between 0 and 1 for each endpoint. It is empty when the index says nothing, so that other scorers decide.
func (s *Scorer) Score(
	ctx context.Context, request *scheduling.InferenceRequest, endpoints []scheduling.Endpoint,
) map[scheduling.Endpoint]float64 {
	scored := make(map[scheduling.Endpoint]float64, len(endpoints))
	pods := make([]string, 0, len(endpoints))
	for _, endpoint := range endpoints {
		if pod := podOf(endpoint); pod != "" {
			pods = append(pods, pod)
		}
	}
	prompt := promptOf(request)
	if s.report && request != nil {
		prompt.RequestID = request.RequestID
	}
	scores := s.scorer.Scores(ctx, prompt, pods)
	if scores == nil {
		return scored
	}
	for _, endpoint := range endpoints {
		scored[endpoint] = scores[podOf(endpoint)]
	}
	return scored
}

// PreRequest records the placement in the background: it neither delays nor fails the request, and what it leaves in
// the index goes by itself after its time.
func (s *Scorer) PreRequest(
	_ context.Context, request *scheduling.InferenceRequest, result *scheduling.SchedulingResult,
) error {
	if result == nil {
		return nil
	}
	if result.ProfileResults[prefillProfile] != nil && request != nil {
		s.scorer.Forget(request.RequestID) // the pod that answers finds what was sent to it, not what it had
	}
	if !s.record {
		return nil
	}
	prompt, told := promptOf(request), map[string]bool{}
	for _, profile := range []string{result.PrimaryProfileName, prefillProfile} {
		picked := result.ProfileResults[profile]
		if picked == nil || len(picked.TargetEndpoints) == 0 {
			continue
		}
		// The first is where it goes; the others are for a second attempt.
		if pod := podOf(picked.TargetEndpoints[0]); pod != "" && !told[pod] {
			told[pod] = true
			s.scorer.Placed(prompt, pod)
		}
	}
	return nil
}

// ResponseBody reports in the background, at the end of an answer, what the engine found in its cache. An engine that
// does not say so (vLLM: --enable-prompt-tokens-details) is not taken for one that found nothing.
func (s *Scorer) ResponseBody(
	_ context.Context, request *scheduling.InferenceRequest, response *requestcontrol.Response,
	target *datalayer.EndpointMetadata,
) {
	if !s.report || request == nil || response == nil || !response.EndOfStream {
		return
	}
	usage := response.Usage
	if usage.PromptTokenDetails == nil || target == nil || usage.PromptTokens < 0 || usage.PromptTokenDetails.CachedTokens < 0 {
		s.scorer.Forget(request.RequestID)
		return
	}
	cached, prompt := uint32(usage.PromptTokenDetails.CachedTokens), uint32(usage.PromptTokens)
	s.scorer.Served(request.TargetModel, request.RequestID, nameOf(target), cached, prompt)
}

// podOf is the endpoint's name in the index.
func podOf(endpoint scheduling.Endpoint) string {
	if endpoint == nil {
		return ""
	}
	return nameOf(endpoint.GetMetadata())
}

// nameOf is ip:port.
func nameOf(metadata *datalayer.EndpointMetadata) string {
	if metadata == nil || metadata.Address == "" {
		return ""
	}
	return net.JoinHostPort(metadata.Address, metadata.Port)
}

// promptOf is what can be asked for. Tokens first: the router has made them already, and with them the features of
// images. Several prompts in one request have no common prefix, and nothing is asked for them.
func promptOf(request *scheduling.InferenceRequest) prefix.Prompt {
	if request == nil || request.Body == nil {
		return prefix.Prompt{}
	}
	body := request.Body
	prompt := prefix.Prompt{Model: request.TargetModel, CacheSalt: body.CacheSalt()}
	switch {
	case body.TokenizedPrompt != nil && len(body.TokenizedPrompt.PerPromptTokens) == 1:
		prompt.Tokens = body.TokenizedPrompt.PerPromptTokens[0]
		for _, each := range body.TokenizedPrompt.MultiModalFeatures {
			prompt.Features = append(prompt.Features, prefix.Feature{
				Hash: each.Hash, Offset: uint32(each.Offset), Length: uint32(each.Length),
			})
		}
	case body.TokenizedPrompt != nil && len(body.TokenizedPrompt.PerPromptTokens) > 1:
	case body.ChatCompletions != nil:
		// The body as it came: the parsed form lacks fields that templates read.
		if payload, ok := body.Payload.(requesthandling.PayloadMap); ok {
			if chat, err := json.Marshal(payload); err == nil {
				prompt.Chat = string(chat)
			}
		}
	case body.Completions != nil:
		given := body.Completions.Prompt
		switch {
		case len(given.TokenIDs) > 0:
			prompt.Tokens = given.TokenIDs
		case given.Raw != "":
			prompt.Text = given.Raw
		case len(given.Strings) == 1:
			prompt.Text = given.Strings[0]
		}
	}
	return prompt
}
