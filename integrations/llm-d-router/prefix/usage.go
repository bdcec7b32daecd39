package prefix

import (
	"sync"

	"kvindex.local/router/kvindexpb"
)

// maxForeseen bounds the requests whose predictions wait for the engine's answer.
const maxForeseen = 8192

// foreseen is what was predicted of requests that are under way, by request and pod; the oldest give way.
type foreseen struct {
	mutex    sync.Mutex
	requests map[string]map[string]uint32
	order    []string // of their first answer; may name requests that are gone
}

// add keeps the tokens that an answer said each pod holds. A request may be scored several times, once per profile.
func (f *foreseen) add(request string, answer *kvindexpb.ScoreResponse) {
	if request == "" {
		return
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if f.requests == nil {
		f.requests = map[string]map[string]uint32{}
	}
	pods := f.requests[request]
	if pods == nil {
		for len(f.order) >= maxForeseen {
			delete(f.requests, f.order[0])
			f.order = f.order[1:]
		}
		pods = make(map[string]uint32, len(answer.GetScores()))
		f.requests[request], f.order = pods, append(f.order, request)
	}
	for _, each := range answer.GetScores() {
		pods[each.GetPod()] = each.GetMatchedTokens()
	}
}

// take forgets the request; false when nothing was predicted of the pod.
func (f *foreseen) take(request, pod string) (uint32, bool) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	tokens, known := f.requests[request][pod]
	delete(f.requests, request)
	return tokens, known
}
