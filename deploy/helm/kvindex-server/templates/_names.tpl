{{- define "kvindex.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvindex.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "kvindex.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "kvindex.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "kvindex.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kvindex.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "kvindex.selector" -}}
app.kubernetes.io/name: {{ include "kvindex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvindex.labels" -}}
{{ include "kvindex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "kvindex.headlessName" -}}
{{- include "kvindex.fullname" . | trunc 54 | trimSuffix "-" -}}-headless
{{- end -}}

{{- define "kvindex.tlsSecret" -}}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.secretName) -}}
{{- include "kvindex.fullname" . | trunc 59 | trimSuffix "-" -}}-tls
{{- else -}}
{{- required "tls.secretName or tls.certManager is required with tls.enabled" .Values.tls.secretName -}}
{{- end -}}
{{- end -}}

{{- /* "true" when the gRPC ports speak TLS, by the chart's values or by the server's own settings; else empty. */ -}}
{{- define "kvindex.speaksTls" -}}
{{- if or .Values.tls.enabled (dig "tls" "cert_file" "" .Values.config) -}}true{{- end -}}
{{- end -}}

{{- /* What grpcurl needs to be let in. */ -}}
{{- define "kvindex.grpcurlFlags" -}}
{{- ternary "-insecure" "-plaintext" (eq (include "kvindex.speaksTls" .) "true") -}}
{{- if include "kvindex.wantsCertificates" . }} -cert client.crt -key client.key{{ end -}}
{{- if or (dig "auth" "tokens_file" "" .Values.config) (dig "auth" "admin_tokens_file" "" .Values.config) (dig "auth" "review" "url" "" .Values.config) }} -H "authorization: Bearer $TOKEN"{{ end -}}
{{- end -}}

{{- /* "true" when the index is written to a volume; one in a shared store has no need of it. */ -}}
{{- define "kvindex.keepsSnapshots" -}}
{{- if and .Values.snapshot.enabled (not .Values.store.url) (not (dig "store" "addresses" list .Values.config)) -}}true{{- end -}}
{{- end -}}

{{- /* "true" when callers must show a certificate, by the chart's values or by the server's own settings; else empty. */ -}}
{{- define "kvindex.wantsCertificates" -}}
{{- if or .Values.tls.clientCertificates (dig "tls" "client_ca_file" "" .Values.config) (dig "tls" "admin_client_ca_file" "" .Values.config) -}}true{{- end -}}
{{- end -}}

{{- /* "true" when a starting replica asks the others for their state; else empty. */ -}}
{{- define "kvindex.asksPeers" -}}
{{- $auth := or (dig "auth" "admin_tokens_file" "" .Values.config) (dig "auth" "review" "url" "" .Values.config) -}}
{{- $stranger := or (include "kvindex.wantsCertificates" .) (and $auth (not (dig "snapshot" "peer_token_file" "" .Values.config))) -}}
{{- /* Over TLS of the server's own settings only they can name the CA. */ -}}
{{- $unknown := and (dig "tls" "cert_file" "" .Values.config) (not (dig "snapshot" "peer_ca_file" "" .Values.config)) -}}
{{- if and (include "kvindex.keepsSnapshots" .) .Values.snapshot.peers .Values.service.headless (not $stranger) (not $unknown) -}}true{{- end -}}
{{- end -}}

{{- /* Half of the container's memory limit, for each configured model alike; empty without a limit that can be read. */ -}}
{{- define "kvindex.maxIndexBytes" -}}
{{- $limit := dig "limits" "memory" "" .Values.resources -}}
{{- $limit = kindIs "float64" $limit | ternary (printf "%.0f" $limit) (toString $limit) -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if regexMatch "^[0-9]+([kMGT]|[KMGT]i)?$" $limit -}}
{{- $number := regexFind "^[0-9]+" $limit -}}
{{- $bytes := mul (int64 $number) (get $units (trimPrefix $number $limit)) -}}
{{- div $bytes (mul 2 (max 1 (len (dig "models" list .Values.config)))) -}}
{{- end -}}
{{- end -}}

{{- /* The server's configuration file: the user's values, and what follows from the chart's. */ -}}
{{- define "kvindex.config" -}}
{{- $made := dict
      "listen" (printf "0.0.0.0:%d" (int .Values.ports.grpc))
      "metrics_listen" (printf "0.0.0.0:%d" (int .Values.ports.metrics)) -}}
{{- if .Values.ports.admin -}}
{{- $_ := set $made "admin_listen" (printf "0.0.0.0:%d" (int .Values.ports.admin)) -}}
{{- end -}}
{{- if .Values.ports.http -}}
{{- $_ := set $made "http" (dict "listen" (printf "0.0.0.0:%d" (int .Values.ports.http))) -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $tls := dict "cert_file" "/etc/kvindex-tls/tls.crt" "key_file" "/etc/kvindex-tls/tls.key" -}}
{{- if .Values.tls.clientCertificates -}}
{{- $_ := set $tls "client_ca_file" "/etc/kvindex-tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $made "tls" $tls -}}
{{- end -}}
{{- if include "kvindex.keepsSnapshots" . -}}
{{- $snapshot := dict "directory" "/var/lib/kvindex" -}}
{{- if include "kvindex.asksPeers" . -}}
{{- if not (dig "snapshot" "peers" list .Values.config) -}}
{{- $port := int (.Values.ports.admin | default .Values.ports.grpc) -}}
{{- $_ := set $snapshot "peers" (list (printf "%s:%d" (include "kvindex.headlessName" .) $port)) -}}
{{- end -}}
{{- if and .Values.tls.enabled (not (dig "snapshot" "peer_ca_file" "" .Values.config)) -}}
{{- $_ := set $snapshot "peer_ca_file" "/etc/kvindex-tls/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- $_ := set $made "snapshot" $snapshot -}}
{{- end -}}
{{- /* Said explicitly, 0 too, it stays; a shared store keeps the index elsewhere. */ -}}
{{- $ownBound := hasKey (dig "limits" dict .Values.config) "max_index_bytes" -}}
{{- $elsewhere := or .Values.store.url (dig "store" "addresses" list .Values.config) -}}
{{- with include "kvindex.maxIndexBytes" . -}}
{{- if not (or $ownBound $elsewhere) -}}
{{- $_ := set $made "limits" (dict "max_index_bytes" (int64 .)) -}}
{{- end -}}
{{- end -}}
{{- /* A client that stays connected never calls a replica that came later. */ -}}
{{- $server := dig "server" dict .Values.config -}}
{{- if and .Values.autoscaling.enabled (ne (dig "transport" "" $server) "native") (not (hasKey $server "max_connection_age_seconds")) -}}
{{- $_ := set $made "server" (dict "max_connection_age_seconds" 300) -}}
{{- end -}}
{{- $store := dict -}}
{{- if .Values.store.url -}}
{{- $url := urlParse .Values.store.url -}}
{{- $_ := set $store "addresses" (list $url.host) -}}
{{- $_ := set $store "tls" (hasSuffix "s" $url.scheme) -}}
{{- with $url.userinfo -}}
{{- $_ := set $store "username" . -}}
{{- end -}}
{{- with trimPrefix "/" $url.path -}}
{{- $_ := set $store "database" (int .) -}}
{{- end -}}
{{- end -}}
{{- if .Values.store.secretName -}}
{{- $_ := set $store "password_file" "/etc/kvindex-store/password" -}}
{{- end -}}
{{- if $store -}}
{{- $_ := set $made "store" $store -}}
{{- end -}}
{{- toYaml (merge $made (deepCopy .Values.config)) -}}
{{- end -}}
