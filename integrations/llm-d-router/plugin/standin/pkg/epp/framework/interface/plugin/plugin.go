// Package plugin declares what every plugin of the router is. Stand-in: see the README of this module.
package plugin

import (
	"context"
	"encoding/json"
)

type TypedName struct {
	Type string
	Name string
}

type Plugin interface {
	TypedName() TypedName
}

type StateDumper interface {
	DumpState() any
}

type Handle interface {
	Context() context.Context
}

type FactoryFunc func(name string, parameters *json.Decoder, handle Handle) (Plugin, error)

var Registry = map[string]FactoryFunc{}

func Register(pluginType string, factory FactoryFunc) { Registry[pluginType] = factory }
