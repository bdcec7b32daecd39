// Package requesthandling declares a parsed request. Stand-in: see the README of this module.
package requesthandling

type RequestPayload interface {
	isRequestPayload()
	IsParsed() bool
}

type PayloadMap map[string]any

func (PayloadMap) isRequestPayload() {}
func (PayloadMap) IsParsed() bool    { return true }

type MultiModalFeature struct {
	Hash   string
	Offset int
	Length int
}

type TokenizedPrompt struct {
	PerPromptTokens    [][]uint32
	MultiModalFeatures []MultiModalFeature
}

type Prompt struct {
	Raw      string
	Strings  []string
	TokenIDs []uint32
}

type CompletionsRequest struct {
	Prompt    Prompt
	CacheSalt string
}

type ChatCompletionsRequest struct {
	CacheSalt string
}

type InferenceRequestBody struct {
	Completions     *CompletionsRequest
	ChatCompletions *ChatCompletionsRequest
	Payload         RequestPayload
	TokenizedPrompt *TokenizedPrompt
}

func (b *InferenceRequestBody) CacheSalt() string {
	switch {
	case b.ChatCompletions != nil:
		return b.ChatCompletions.CacheSalt
	case b.Completions != nil:
		return b.Completions.CacheSalt
	}
	return ""
}

type Usage struct {
	PromptTokens       int
	PromptTokenDetails *PromptTokenDetails
}

type PromptTokenDetails struct {
	CachedTokens int
}
