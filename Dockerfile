# Every inferq image is a target of this file. Build from the repository's root, with BuildKit:
#
#   docker build --target ocr -t inferq-ocr .
#
#   ocr, ocr-gpu            RapidOCR on the CPU, PaddleOCR on an NVIDIA GPU
#   ner, ner-gpu            LAC on the CPU, PaddleNLP on an NVIDIA GPU
#   acestep, acestep-gpu    the preview on the CPU, ACE-Step on an NVIDIA GPU
#   facefusion              the preview on the CPU
#   echo                    the echo worker, which checks a deployment
#   callbacks               delivers callbacks and feeds batches; with the argument `beat`, starts nightly runs;
#                           with `monitor`, reads the figures of queues and workers; with `scale-in-guard`, keeps
#                           Kubernetes from removing busy workers
#   gateway                 the HTTP gateway; also built without --target
#
# ocr-gpu and ner-gpu also need --build-arg PADDLE_INDEX=URL: the package index with Paddle's builds for GPUs.
# The root file system may be read-only: containers write to their volumes only (/scratch, /weights).

FROM python:3.11.14-slim-bookworm AS base
ENV PATH=/opt/inferq/bin:$PATH

# Installs into /opt/inferq. A finished image copies that folder, without sources and pip's files.
FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/inferq
WORKDIR /src
COPY . .

# Every finished image: an unprivileged user and folders that it may write to.
FROM base AS runtime
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN mkdir /scratch /weights && chown 65532:65532 /scratch /weights
USER 65532:65532
STOPSIGNAL SIGTERM

# Every image but the gateway: scratch space, and probes on port 9000.
FROM runtime AS consumer
ENV HOME=/scratch INFERQ_PROBE_HOST=0.0.0.0 INFERQ_PROBE_PORT=9000
VOLUME ["/scratch"]
WORKDIR /scratch
EXPOSE 9000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/healthz', timeout=4)"]

FROM consumer AS worker
ENV INFERQ_SCRATCH_DIR=/scratch

# Workers whose engines load weights from a cache.
FROM worker AS weights-worker
ENV INFERQ_WEIGHTS_CACHE=/weights
VOLUME ["/weights"]

# PDFs may name Chinese, Japanese and Korean fonts that they do not contain.
FROM base AS fonts
# Debian keeps one version of a package; a pinned one would no longer be found after the next point release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends fonts-wqy-microhei

FROM build AS build-ocr
RUN pip install -c constraints.txt '.[ocr,otel]'
FROM weights-worker AS ocr
COPY --from=fonts /usr/share/fonts /usr/share/fonts
COPY --from=build-ocr /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "ocr"]

FROM build AS build-ocr-gpu
# Paddle's build for GPUs brings its CUDA libraries. PaddleOCR requires other versions than constraints.txt has.
ARG PADDLE_INDEX
RUN pip install -c constraints-engines.txt '.[paddleocr,otel]' \
    && pip install -c constraints-engines.txt --extra-index-url "${PADDLE_INDEX:?}" paddlepaddle-gpu==3.3.1
FROM weights-worker AS ocr-gpu
COPY --from=fonts /usr/share/fonts /usr/share/fonts
COPY --from=build-ocr-gpu /opt/inferq /opt/inferq
ENV INFERQ_OCR_BACKEND=paddleocr INFERQ_DEVICE=cuda PADDLE_PDX_CACHE_HOME=/weights/paddlex
ENTRYPOINT ["inferq", "worker", "ocr"]

FROM build AS build-ner
RUN pip install -c constraints.txt '.[ner,otel]'
FROM weights-worker AS ner
COPY --from=build-ner /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "ner"]

FROM build AS build-ner-gpu
# PaddleNLP 2.8 requires Paddle 2.
ARG PADDLE_INDEX
RUN pip install -c constraints.txt '.[paddlenlp,otel]' \
    && pip install -c constraints.txt --extra-index-url "${PADDLE_INDEX:?}" paddlepaddle-gpu==2.6.2
FROM weights-worker AS ner-gpu
COPY --from=build-ner-gpu /opt/inferq /opt/inferq
ENV INFERQ_NER_BACKEND=paddlenlp INFERQ_DEVICE=cuda PPNLP_HOME=/weights/paddlenlp
ENTRYPOINT ["inferq", "worker", "ner"]

FROM build AS build-acestep
RUN pip install -c constraints.txt '.[acestep,otel]'
FROM weights-worker AS acestep
COPY --from=build-acestep /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "acestep"]

FROM build AS build-acestep-gpu
# The default build of torch brings its CUDA libraries.
RUN pip install -c constraints-engines.txt '.[acestep-diffusers,otel]'
FROM weights-worker AS acestep-gpu
COPY --from=build-acestep-gpu /opt/inferq /opt/inferq
ENV INFERQ_ACESTEP_BACKEND=diffusers INFERQ_DEVICE=cuda HF_HOME=/weights/huggingface
ENTRYPOINT ["inferq", "worker", "acestep"]

# For FaceFusion itself, build on this image, install it, and set INFERQ_FACEFUSION_BACKEND, _HOME and _PYTHON
# (docs/engines.md). It needs another Python and its own weights; read their licences first.
FROM build AS build-facefusion
# mediapipe installs a second OpenCV into the same folder, one that needs a display's libraries.
RUN pip install -c constraints.txt '.[facefusion,otel]' \
    && pip install -c constraints.txt --no-deps --force-reinstall opencv-python-headless
FROM worker AS facefusion
COPY --from=build-facefusion /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "facefusion"]

FROM build AS build-echo
RUN pip install -c constraints.txt '.[worker,otel]'
FROM worker AS echo
COPY --from=build-echo /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "echo"]

FROM build AS build-callbacks
RUN pip install -c constraints.txt '.[worker,jobs,kubernetes,otel]'
FROM consumer AS callbacks
COPY --from=build-callbacks /opt/inferq /opt/inferq
# For the temporary files of batches.
ENV TMPDIR=/scratch
ENTRYPOINT ["inferq"]
CMD ["callbacks"]

# For a plug-in's task type, build on this image and install the plug-in. API keys are in INFERQ_API_KEYS_FILE.
FROM build AS build-gateway
RUN pip install -c constraints.txt '.[gateway,otel]'
FROM runtime AS gateway
COPY --from=build-gateway /opt/inferq /opt/inferq
ENV HOME=/tmp INFERQ_GATEWAY_HOST=0.0.0.0 INFERQ_GATEWAY_PORT=8000
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["inferq", "gateway"]
