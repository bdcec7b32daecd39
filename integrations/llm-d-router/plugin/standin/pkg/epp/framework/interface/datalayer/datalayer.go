// Package datalayer declares what is known of an endpoint. Stand-in: see the README of this module.
package datalayer

type EndpointMetadata struct {
	Address string
	Port    string
}
