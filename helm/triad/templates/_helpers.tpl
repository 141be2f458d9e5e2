{{- define "triad.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "triad.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "triad.labels" -}}
{{ include "triad.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "triad.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion .Values.image.target) }}
{{- end }}

{{- define "triad.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "triad.fullname" .) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "triad.valkeyName" -}}{{ include "triad.fullname" . }}-valkey{{- end }}

{{- define "triad.redisAddress" -}}
{{- .Values.externalRedis.address | default (printf "%s:6379" (include "triad.valkeyName" .)) }}
{{- end }}

{{- define "triad.redisSecret" -}}
{{- if .Values.externalRedis.address }}{{ .Values.externalRedis.existingSecret }}
{{- else }}{{ .Values.valkey.existingSecret | default (include "triad.valkeyName" .) }}{{ end }}
{{- end }}

{{- define "triad.redisPasswordKey" -}}
{{- if .Values.externalRedis.address }}{{ .Values.externalRedis.passwordKey }}{{ else }}password{{ end }}
{{- end }}

{{/* The password is named, not written: cluster.config takes it from the environment. */}}
{{- define "triad.redisUrl" -}}
{{- $scheme := ternary "rediss" "redis" (and (ne .Values.externalRedis.address "") .Values.externalRedis.tls) -}}
{{- $who := ternary ":${REDIS_PASSWORD}@" "" (ne (include "triad.redisSecret" .) "") -}}
{{ $scheme }}://{{ $who }}{{ include "triad.redisAddress" . }}/{{ .Values.externalRedis.database }}
{{- end }}

{{- define "triad.graceSeconds" -}}{{ add (int .Values.serve.drain_timeout_s) 60 }}{{- end }}

{{- define "triad.serveConfig" -}}
{{- $args := deepCopy .Values.serve }}
{{- $_ := set $args "app" (include "triad.fullname" .) }}
{{- $_ := set $args "redis_url" (include "triad.redisUrl" .) }}
{{- if .Values.apiKeys.existingSecret }}
{{- $_ := set $args "api_keys_file" (printf "/etc/triad/keys/%s" .Values.apiKeys.secretKey) }}
{{- end }}
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: triad
    route_prefix: /
    import_path: cluster.app:deploy
    args:
      {{- toYaml $args | nindent 6 }}
{{- end }}

{{- define "triad.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "triad.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "triad.env" -}}
- {name: HOME, value: /home/triad}
- {name: HF_HOME, value: /home/triad/hub}
- {name: TMPDIR, value: /tmp}
- {name: RAY_worker_niceness, value: "0"}
{{- if ne .Values.weights.source "hub" }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- else if .Values.weights.hub.tokenSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Values.weights.hub.tokenSecret }}, key: {{ .Values.weights.hub.tokenKey }}}}
{{- end }}
{{- with include "triad.redisSecret" . }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ include "triad.redisPasswordKey" $ }}}}
{{- end }}
{{- range $name, $value := .Values.telemetry.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "triad.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/triad}
- {name: shm, mountPath: /dev/shm}
{{- if .Values.apiKeys.existingSecret }}
- {name: keys, mountPath: /etc/triad/keys, readOnly: true}
{{- end }}
{{- end }}

{{- define "triad.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.scratchSize }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.workers.shmSize }}}
{{- if .Values.apiKeys.existingSecret }}
- name: keys
  secret: {secretName: {{ .Values.apiKeys.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}
