package client

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"kvindex.local/router/kvindexpb"
)

const patience = 20 * time.Second

type replica struct {
	kvindexpb.UnimplementedKVIndexServer
	score  func(context.Context) (*kvindexpb.ScoreResponse, error)
	placed atomic.Int32
	asked  atomic.Int32
	told   atomic.Int32
	health *health.Server
}

func (r *replica) Score(ctx context.Context, _ *kvindexpb.ScoreRequest) (*kvindexpb.ScoreResponse, error) {
	r.asked.Add(1)
	return r.score(ctx)
}

func (r *replica) RecordPlacement(
	context.Context, *kvindexpb.RecordPlacementRequest,
) (*kvindexpb.RecordPlacementResponse, error) {
	r.placed.Add(1)
	return &kvindexpb.RecordPlacementResponse{TotalBlocks: 4}, nil
}

func (r *replica) ReportUsage(context.Context, *kvindexpb.ReportUsageRequest) (*kvindexpb.ReportUsageResponse, error) {
	r.told.Add(1)
	return &kvindexpb.ReportUsageResponse{}, nil
}

// serve starts a replica; stop ends it at once, as a killed process would.
func serve(t *testing.T, score func(context.Context) (*kvindexpb.ScoreResponse, error)) (*replica, string, func()) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	one := &replica{score: score, health: health.NewServer()}
	one.health.SetServingStatus("kvindex.v1.KVIndex", healthpb.HealthCheckResponse_SERVING)
	server := grpc.NewServer()
	kvindexpb.RegisterKVIndexServer(server, one)
	healthpb.RegisterHealthServer(server, one.health)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return one, listener.Addr().String(), server.Stop
}

func dial(t *testing.T, options Options) *Client {
	t.Helper()
	client, err := New(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func answer(blocks uint32) func(context.Context) (*kvindexpb.ScoreResponse, error) {
	return func(context.Context) (*kvindexpb.ScoreResponse, error) {
		return &kvindexpb.ScoreResponse{TotalBlocks: blocks}, nil
	}
}

func TestReplicasTakeTurnsAndADeadOneCostsNoAnswer(t *testing.T) {
	first, firstAt, kill := serve(t, answer(1))
	second, secondAt, _ := serve(t, answer(2))
	client := dial(t, Options{Endpoints: []string{firstAt, secondAt}})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	score := func() uint32 {
		got, err := client.Score(ctx, &kvindexpb.ScoreRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return got.TotalBlocks
	}
	for range 4 {
		score()
	}
	if first.asked.Load() != 2 || second.asked.Load() != 2 {
		t.Fatalf("asked %d and %d times", first.asked.Load(), second.asked.Load())
	}
	kill()
	for range 10 {
		if score() != 2 {
			t.Fatal("a dead replica answered")
		}
	}
}

func TestAReplicaThatIsNotReadyIsNotAsked(t *testing.T) {
	unready, unreadyAt, _ := serve(t, answer(1))
	unready.health.SetServingStatus("kvindex.v1.KVIndex", healthpb.HealthCheckResponse_NOT_SERVING)
	_, readyAt, _ := serve(t, answer(2))
	client := dial(t, Options{Endpoints: []string{unreadyAt, readyAt}})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for range 6 {
		got, err := client.Score(ctx, &kvindexpb.ScoreRequest{})
		if err != nil || got.TotalBlocks != 2 {
			t.Fatal(got, err)
		}
	}
	if unready.asked.Load() != 0 {
		t.Fatal("it was asked")
	}
}

func TestAHedgeWinsAndTheLoserIsCancelled(t *testing.T) {
	cancelled := make(chan struct{})
	_, slowAt, _ := serve(t, func(ctx context.Context) (*kvindexpb.ScoreResponse, error) {
		<-ctx.Done()
		close(cancelled)
		return nil, ctx.Err()
	})
	_, fastAt, _ := serve(t, answer(2))
	client := dial(t, Options{Endpoints: []string{fastAt, slowAt}, HedgeAfter: 10 * time.Millisecond})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got, err := client.Score(ctx, &kvindexpb.ScoreRequest{}) // its turn: the slow one first
	if err != nil || got.TotalBlocks != 2 {
		t.Fatal(got, err)
	}
	select {
	case <-cancelled:
	case <-time.After(patience):
		t.Fatal("the slow replica still works")
	}
}

func refuse(code codes.Code, again bool) func(context.Context) (*kvindexpb.ScoreResponse, error) {
	return func(context.Context) (*kvindexpb.ScoreResponse, error) {
		told := status.New(code, "refused")
		if again {
			told, _ = told.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
		}
		return nil, told.Err()
	}
}

func TestOnlyWhatAnotherReplicaMayDoBetterIsAskedThere(t *testing.T) {
	for _, each := range []struct {
		code      codes.Code
		retryInfo bool
		elsewhere bool
	}{
		{codes.Unavailable, false, true},
		{codes.ResourceExhausted, true, true},
		{codes.ResourceExhausted, false, false},
		{codes.InvalidArgument, false, false},
		{codes.NotFound, false, false},
		{codes.Unauthenticated, false, false},
	} {
		_, badAt, _ := serve(t, refuse(each.code, each.retryInfo))
		good, goodAt, _ := serve(t, answer(2))
		client := dial(t, Options{Endpoints: []string{goodAt, badAt}})
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		_, err := client.Score(ctx, &kvindexpb.ScoreRequest{})
		cancel()
		if (err == nil) != each.elsewhere || (good.asked.Load() == 1) != each.elsewhere {
			t.Errorf("%s with RetryInfo %t: %v, asked %d", each.code, each.retryInfo, err, good.asked.Load())
		}
		if err != nil && status.Code(err) != each.code {
			t.Errorf("%s became %v", each.code, err)
		}
	}
}

func TestTheDeadlineEndsACall(t *testing.T) {
	_, at, _ := serve(t, func(ctx context.Context) (*kvindexpb.ScoreResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	client := dial(t, Options{Endpoints: []string{at}})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := client.Score(ctx, &kvindexpb.ScoreRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatal(err)
	}
}

func TestAPlacementReachesEveryReplicaAndSaysWhichMissedIt(t *testing.T) {
	first, firstAt, _ := serve(t, answer(1))
	second, secondAt, kill := serve(t, answer(1))
	client := dial(t, Options{Endpoints: []string{firstAt, secondAt}})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	recorded, err := client.RecordPlacement(ctx, &kvindexpb.RecordPlacementRequest{})
	if recorded != 2 || err != nil || first.placed.Load() != 1 || second.placed.Load() != 1 {
		t.Fatal(recorded, err)
	}
	kill()
	recorded, err = client.RecordPlacement(ctx, &kvindexpb.RecordPlacementRequest{})
	if recorded != 1 || err == nil || first.placed.Load() != 2 {
		t.Fatal(recorded, err)
	}
}

func TestATokenNeedsTLS(t *testing.T) {
	token := func() (string, error) { return "secret", nil }
	if _, err := New(Options{Endpoints: []string{"127.0.0.1:1"}, Token: token}); err == nil {
		t.Fatal("a token would travel in the clear")
	}
	if _, err := New(Options{}); err == nil {
		t.Fatal("no endpoint")
	}
	got, err := bearer(token).GetRequestMetadata(context.Background())
	if err != nil || metadata.New(got).Get("authorization")[0] != "Bearer secret" {
		t.Fatal(got, err)
	}
}

func TestUsageIsCountedByOneReplica(t *testing.T) {
	first, firstAt, kill := serve(t, answer(1))
	second, secondAt, _ := serve(t, answer(2))
	client := dial(t, Options{Endpoints: []string{firstAt, secondAt}})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for range 4 {
		if err := client.ReportUsage(ctx, &kvindexpb.ReportUsageRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if first.told.Load() != 2 || second.told.Load() != 2 {
		t.Fatal(first.told.Load(), second.told.Load())
	}
	kill()
	failed := 0
	for range 4 {
		if client.ReportUsage(ctx, &kvindexpb.ReportUsageRequest{}) != nil {
			failed++
		}
	}
	if failed != 2 || second.told.Load() != 4 {
		t.Fatal("it was told twice, or not at all", failed, second.told.Load())
	}
}
