// Package client asks one or several replicas of kvindex-server over gRPC.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // watches replicas when the service config asks for it
	"google.golang.org/grpc/status"

	"kvindex.local/router/kvindexpb"
)

// Health is watched under round_robin only; there is one address to it all the same.
const serviceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "kvindex.v1.KVIndex"}
}`

// Options of a Client. Endpoints are replicas that follow the same fleet, as gRPC targets.
type Options struct {
	Endpoints []string
	// A Score without an answer for so long is asked of the next replica, too; 0 = never.
	HedgeAfter time.Duration
	// Nil for a plain connection.
	TLS *tls.Config
	// Called for every try; nil sends no token. A token needs TLS.
	Token func() (string, error)
}

// Client is safe for concurrent use. Deadlines come from the context of each call.
type Client struct {
	options Options
	conns   []*grpc.ClientConn
	stubs   []kvindexpb.KVIndexClient
	turn    atomic.Uint32
}

// New makes the connections, which are established with the first calls.
func New(options Options) (*Client, error) {
	if len(options.Endpoints) == 0 {
		return nil, errors.New("endpoints: at least one is needed")
	}
	if options.Token != nil && options.TLS == nil {
		return nil, errors.New("token: would travel in the clear; set TLS")
	}
	transport := insecure.NewCredentials()
	if options.TLS != nil {
		transport = credentials.NewTLS(options.TLS)
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDisableRetry(), // retries are made here, where the other replicas are known
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: time.Second,
		}),
	}
	if options.Token != nil {
		dial = append(dial, grpc.WithPerRPCCredentials(bearer(options.Token)))
	}
	client := &Client{options: options}
	for _, endpoint := range options.Endpoints {
		conn, err := grpc.NewClient(endpoint, dial...)
		if err != nil {
			_ = client.Close()
			return nil, fmt.Errorf("endpoint %s: %w", endpoint, err)
		}
		client.conns = append(client.conns, conn)
		client.stubs = append(client.stubs, kvindexpb.NewKVIndexClient(conn))
	}
	return client, nil
}

// Close ends the connections and what is under way on them.
func (c *Client) Close() error {
	var all []error
	for _, conn := range c.conns {
		all = append(all, conn.Close())
	}
	return errors.Join(all...)
}

// Stubs are the generated clients, one per endpoint, for all that this type does not do.
func (c *Client) Stubs() []kvindexpb.KVIndexClient { return c.stubs }

// Score asks one replica, in turn; the next one when it cannot answer, or beside it when it is slow. The first answer
// wins, the other call is cancelled. Each replica is asked once at most.
func (c *Client) Score(ctx context.Context, request *kvindexpb.ScoreRequest) (*kvindexpb.ScoreResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		answer *kvindexpb.ScoreResponse
		err    error
	}
	count := len(c.stubs)
	ended := make(chan result, count) // nobody waits for the losers
	first, started, running := int(c.turn.Add(1)), 0, 0
	var hedge <-chan time.Time
	start := func() {
		stub := c.stubs[(first+started)%count]
		started, running, hedge = started+1, running+1, nil
		go func() {
			answer, err := stub.Score(ctx, request)
			ended <- result{answer, err}
		}()
		if c.options.HedgeAfter > 0 && started < count {
			hedge = time.After(c.options.HedgeAfter)
		}
	}
	start()
	for {
		select {
		case <-hedge:
			start()
		case one := <-ended:
			running--
			if one.err == nil {
				return one.answer, nil
			}
			if !elsewhere(one.err) || ctx.Err() != nil {
				return nil, one.err
			}
			if started < count {
				start()
			} else if running == 0 {
				return nil, one.err
			}
		}
	}
}

// RecordPlacement tells every replica, since each keeps placements of its own: how many recorded it, and the errors of
// the others joined. It is never asked twice of one replica.
func (c *Client) RecordPlacement(ctx context.Context, request *kvindexpb.RecordPlacementRequest) (int, error) {
	failures := make([]error, len(c.stubs))
	var all sync.WaitGroup
	for number, stub := range c.stubs {
		all.Add(1)
		go func() {
			defer all.Done()
			if _, err := stub.RecordPlacement(ctx, request); err != nil {
				failures[number] = fmt.Errorf("%s: %w", c.options.Endpoints[number], err)
			}
		}()
	}
	all.Wait()
	recorded := 0
	for _, failure := range failures {
		if failure == nil {
			recorded++
		}
	}
	return recorded, errors.Join(failures...)
}

// ReportUsage tells one replica, in turn, and once: it only counts, and an answer that was lost may have counted.
func (c *Client) ReportUsage(ctx context.Context, request *kvindexpb.ReportUsageRequest) error {
	_, err := c.stubs[int(c.turn.Add(1))%len(c.stubs)].ReportUsage(ctx, request)
	return err
}

// elsewhere tells whether another replica may do better. RESOURCE_EXHAUSTED with a time to try again is one replica's
// load; without it the request is too large for each of them.
func elsewhere(err error) bool {
	switch told := status.Convert(err); told.Code() {
	case codes.Unavailable:
		return true
	case codes.ResourceExhausted:
		for _, detail := range told.Details() {
			if _, ok := detail.(*errdetails.RetryInfo); ok {
				return true
			}
		}
	}
	return false
}

type bearer func() (string, error)

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := b()
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, "the token could not be read")
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

func (b bearer) RequireTransportSecurity() bool { return true }
