// Package requestcontrol declares what runs around scheduling. Stand-in: see the README of this module.
package requestcontrol

import (
	"context"

	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/datalayer"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/plugin"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/requesthandling"
	"github.com/llm-d/llm-d-router/pkg/epp/framework/interface/scheduling"
)

type PreRequest interface {
	plugin.Plugin
	PreRequest(ctx context.Context, request *scheduling.InferenceRequest, result *scheduling.SchedulingResult) error
}

type Response struct {
	EndOfStream bool
	Usage       requesthandling.Usage
}

type ResponseBodyProcessor interface {
	plugin.Plugin
	ResponseBody(
		ctx context.Context, request *scheduling.InferenceRequest, response *Response, target *datalayer.EndpointMetadata,
	)
}
