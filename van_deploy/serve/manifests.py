"""Files that start Triton on a packaged model repository: Compose, Kubernetes, KServe.

Several machines are Triton's and Kubernetes' job. These are starting points with
the parts people forget: probes, requests and limits, an unprivileged user, autoscaling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from van_deploy.config.serving import DEFAULT_TRITON

__all__ = ["Deployment", "manifests"]


@dataclass(frozen=True)
class Deployment:
    """What the manifests need to know.

    Attributes:
        name: of the bundle.
        gpu: whether a GPU is asked for.
        cpus: processors requested.
        memory_mib: memory requested.
        triton: release of Triton.
    """

    name: str
    gpu: bool
    cpus: int = 2
    memory_mib: int = 2048
    triton: str = DEFAULT_TRITON

    @property
    def dns_name(self) -> str:
        """The name as Kubernetes allows it."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:50] or "van"

    @property
    def image(self) -> str:
        """Triton's container image."""
        return f"nvcr.io/nvidia/tritonserver:{self.triton}-py3"


def manifests(deployment: Deployment) -> dict[str, str]:
    """Return the files by name."""
    return {
        "compose.yaml": _compose(deployment),
        "kubernetes.yaml": _kubernetes(deployment),
        "kserve.yaml": _kserve(deployment),
    }


def _compose(d: Deployment) -> str:
    gpu = """
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]"""
    return f"""\
# docker compose up: HTTP on 8000, gRPC on 8001, metrics on 8002, this machine only.
services:
  triton:
    image: {d.image}
    command: >-
      tritonserver --model-repository=/models --strict-readiness=true
      --exit-on-error=true --disable-auto-complete-config
    ports: ["127.0.0.1:8000:8000", "127.0.0.1:8001:8001", "127.0.0.1:8002:8002"]
    volumes: ["./models:/models:ro"]
    shm_size: 256m
    healthcheck:
      test: ["CMD", "curl", "-sf", "http://localhost:8000/v2/health/ready"]
      interval: 10s
      start_period: 60s{gpu if d.gpu else ""}
"""


def _kubernetes(d: Deployment) -> str:
    name = d.dns_name
    gpu = '\n              nvidia.com/gpu: "1"' if d.gpu else ""
    return f"""\
# kubectl apply -f kubernetes.yaml, after copying models/ into the volume {name}-models.
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  replicas: 1
  selector:
    matchLabels: {{app: {name}}}
  template:
    metadata:
      labels: {{app: {name}}}
      annotations:
        prometheus.io/scrape: "true"
        prometheus.io/port: "8002"
    spec:
      terminationGracePeriodSeconds: 60
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
      containers:
        - name: triton
          image: {d.image}
          args:
            - tritonserver
            - --model-repository=/models
            - --strict-readiness=true
            - --disable-auto-complete-config
            - --exit-timeout-secs=45
          ports:
            - {{name: http, containerPort: 8000}}
            - {{name: grpc, containerPort: 8001}}
            - {{name: metrics, containerPort: 8002}}
          startupProbe:
            httpGet: {{path: /v2/health/ready, port: http}}
            periodSeconds: 5
            failureThreshold: 60
          readinessProbe:
            httpGet: {{path: /v2/health/ready, port: http}}
            periodSeconds: 5
          livenessProbe:
            httpGet: {{path: /v2/health/live, port: http}}
            periodSeconds: 15
            failureThreshold: 3
          resources:
            requests:
              cpu: "{d.cpus}"
              memory: {d.memory_mib}Mi{gpu}
            limits:
              memory: {d.memory_mib}Mi{gpu}
          securityContext:
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
          volumeMounts:
            - {{name: models, mountPath: /models, readOnly: true}}
            - {{name: shm, mountPath: /dev/shm}}
      volumes:
        - name: models
          persistentVolumeClaim: {{claimName: {name}-models, readOnly: true}}
        - name: shm
          emptyDir: {{medium: Memory, sizeLimit: 256Mi}}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: http, port: 8000, targetPort: http}}
    - {{name: grpc, port: 8001, targetPort: grpc}}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {name}
spec:
  scaleTargetRef: {{apiVersion: apps/v1, kind: Deployment, name: {name}}}
  minReplicas: 1
  maxReplicas: 4
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {{type: Utilization, averageUtilization: 75}}
"""


def _kserve(d: Deployment) -> str:
    name = d.dns_name
    gpu = '\n          nvidia.com/gpu: "1"' if d.gpu else ""
    return f"""\
# kubectl apply -f kserve.yaml, after copying models/ into the volume {name}-models.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    minReplicas: 1
    maxReplicas: 4
    scaleMetric: concurrency
    scaleTarget: 16
    triton:
      protocolVersion: v2
      runtimeVersion: {d.triton}-py3
      storageUri: pvc://{name}-models/models
      args: ["--strict-readiness=true", "--disable-auto-complete-config"]
      ports:
        - containerPort: 8000
          protocol: TCP
      readinessProbe:
        httpGet: {{path: /v2/health/ready, port: 8000}}
        periodSeconds: 5
      livenessProbe:
        httpGet: {{path: /v2/health/live, port: 8000}}
        periodSeconds: 15
      resources:
        requests:
          cpu: "{d.cpus}"
          memory: {d.memory_mib}Mi{gpu}
        limits:
          memory: {d.memory_mib}Mi{gpu}
"""
