// Package scheduling declares scorers and what they score. Stand-in: see the README of this module.
package scheduling

import (
	"context"

	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/datalayer"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/plugin"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/requesthandling"
)

type ScorerCategory string

const Affinity ScorerCategory = "Affinity"

type Endpoint interface {
	GetMetadata() *datalayer.EndpointMetadata
}

type InferenceRequest struct {
	RequestID   string
	TargetModel string
	Body        *requesthandling.InferenceRequestBody
}

type ProfileRunResult struct {
	TargetEndpoints []Endpoint
}

type SchedulingResult struct {
	ProfileResults     map[string]*ProfileRunResult
	PrimaryProfileName string
}

type Scorer interface {
	plugin.Plugin
	Category() ScorerCategory
	Score(ctx context.Context, request *InferenceRequest, pods []Endpoint) map[Endpoint]float64
}
