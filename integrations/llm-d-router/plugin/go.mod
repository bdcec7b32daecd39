module kvindex.local/router/plugin

go 1.26.0

require (
	github.com/llm-d/llm-d-router v0.0.0
	kvindex.local/router v0.0.0
)

require (
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/sys v0.48.0 // indirect
	golang.org/x/text v0.42.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260817212433-ac3dfec99bb1 // indirect
	google.golang.org/grpc v1.85.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)

replace kvindex.local/router => ../

// See README.md: dropped for a build with the real router.
replace github.com/llm-d/llm-d-router => ./standin
