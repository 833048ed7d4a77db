# Every inferq image is a target of this file. Build from the repository's root, with BuildKit:
#
#   docker build --target ocr -t inferq-ocr .
#   docker buildx bake                              # all images for the CPU: docker-bake.hcl
#
#   ocr, ocr-gpu            RapidOCR on the CPU, PaddleOCR on an NVIDIA GPU
#   ner, ner-gpu            LAC on the CPU, PaddleNLP on an NVIDIA GPU
#   acestep, acestep-gpu    the preview on the CPU, ACE-Step on an NVIDIA GPU
#   facefusion              the preview on the CPU
#   facefusion-gpu          FaceFusion on an NVIDIA GPU, without its weights
#   echo                    the echo worker, which checks a deployment
#   callbacks               delivers callbacks and feeds batches; with the argument `beat`, starts nightly runs;
#                           with `monitor`, reads the figures of queues and workers; with `scale-in-guard`, keeps
#                           Kubernetes from removing busy workers
#   gateway                 the HTTP gateway; also built without --target
#
# ocr-gpu and ner-gpu also need --build-arg PADDLE_INDEX=URL: the package index with Paddle's builds for GPUs.
# The root file system may be read-only: containers write to their volumes only (/scratch, /weights).
# Each image lists its Python packages with their licences in /opt/inferq/sbom.json (CycloneDX).

# To take a newer release, change tag and digest together: docs/images.md says how to find the digest.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
# FaceFusion 3.8 needs Python 3.12.
ARG FACEFUSION_PYTHON_IMAGE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/inferq/bin:$PATH

# Installs into /opt/inferq. A finished image copies that folder, without sources and pip's files.
FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt .
# cyclonedx-py is outside of the environment that it lists.
RUN pip install -c constraints.txt cyclonedx-bom && python -m venv /opt/inferq
ENV SBOM="cyclonedx-py environment --output-reproducible --output-file /opt/inferq/sbom.json /opt/inferq/bin/python"
COPY . .

# Every finished image: an unprivileged user and folders that it may write to.
FROM base AS runtime
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN mkdir /data /scratch /weights && chown 65532:65532 /data /scratch /weights
USER 65532:65532
STOPSIGNAL SIGTERM

# Every image but the gateway: scratch space, also for temporary files of libraries, and probes on port 9000.
FROM runtime AS consumer
ENV HOME=/scratch TMPDIR=/scratch INFERQ_PROBE_HOST=0.0.0.0 INFERQ_PROBE_PORT=9000
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

# Paddle needs OpenMP's library, which the base image does not have.
FROM weights-worker AS paddle-worker
USER 0:0
# Debian keeps one version of a package; a pinned one would no longer be found after the next point release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
USER 65532:65532

# PDFs may name Chinese, Japanese and Korean fonts that they do not contain.
FROM base AS fonts
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends fonts-wqy-microhei

FROM build AS build-ocr
RUN pip install -c constraints.txt '.[ocr,otel]' && $SBOM
FROM weights-worker AS ocr
COPY --from=fonts /usr/share/fonts /usr/share/fonts
COPY --from=build-ocr /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "ocr"]

FROM build AS build-ocr-gpu
# PaddleOCR requires other versions than constraints.txt has. Paddle's own index has its builds for GPUs, which bring
# CUDA's libraries: only Paddle itself comes from there. OpenCV's build with windows needs a display's libraries; its
# name stays, because PaddleX looks for it.
ARG PADDLE_INDEX
RUN pip install -c constraints-engines.txt '.[paddleocr,otel]' \
    && pip install -c constraints-engines.txt --no-deps --index-url "${PADDLE_INDEX:?}" paddlepaddle-gpu==3.3.1 \
    && pip install -c constraints-engines.txt paddlepaddle-gpu==3.3.1 \
    && pip install -c constraints-engines.txt --no-deps --force-reinstall opencv-contrib-python-headless \
    && rm -r /opt/inferq/lib/python*/site-packages/opencv_contrib_python.libs \
        /opt/inferq/lib/python*/site-packages/cv2/qt \
    && $SBOM
FROM paddle-worker AS ocr-gpu
COPY --from=fonts /usr/share/fonts /usr/share/fonts
COPY --from=build-ocr-gpu /opt/inferq /opt/inferq
ENV INFERQ_OCR_BACKEND=paddleocr INFERQ_DEVICE=cuda PADDLE_PDX_CACHE_HOME=/weights/paddlex
ENTRYPOINT ["inferq", "worker", "ocr"]

FROM build AS build-ner
RUN pip install -c constraints.txt '.[ner,otel]' && $SBOM
FROM weights-worker AS ner
COPY --from=build-ner /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "ner"]

FROM build AS build-ner-gpu
# PaddleNLP 2.8 requires Paddle 2.
ARG PADDLE_INDEX
RUN pip install -c constraints.txt '.[paddlenlp,otel]' \
    && pip install -c constraints.txt --no-deps --index-url "${PADDLE_INDEX:?}" paddlepaddle-gpu==2.6.2 \
    && pip install -c constraints.txt paddlepaddle-gpu==2.6.2 \
    && $SBOM
FROM paddle-worker AS ner-gpu
COPY --from=build-ner-gpu /opt/inferq /opt/inferq
ENV INFERQ_NER_BACKEND=paddlenlp INFERQ_DEVICE=cuda PPNLP_HOME=/weights/paddlenlp
ENTRYPOINT ["inferq", "worker", "ner"]

FROM build AS build-acestep
RUN pip install -c constraints.txt '.[acestep,otel]' && $SBOM
FROM weights-worker AS acestep
COPY --from=build-acestep /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "acestep"]

FROM build AS build-acestep-gpu
# The default build of torch brings its CUDA libraries.
RUN pip install -c constraints-engines.txt '.[acestep-diffusers,otel]' && $SBOM
FROM weights-worker AS acestep-gpu
COPY --from=build-acestep-gpu /opt/inferq /opt/inferq
ENV INFERQ_ACESTEP_BACKEND=diffusers INFERQ_DEVICE=cuda HF_HOME=/weights/huggingface
ENTRYPOINT ["inferq", "worker", "acestep"]

FROM build AS build-facefusion
# mediapipe brings OpenCV's build with windows, which needs a display's libraries.
RUN pip install -c constraints.txt '.[facefusion,otel]' \
    && pip uninstall -y opencv-contrib-python \
    && pip install -c constraints.txt opencv-python-headless \
    && $SBOM
FROM worker AS facefusion
COPY --from=build-facefusion /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "facefusion"]

# FaceFusion (OpenRAIL-AS) is fetched when this image is built, and has a Python and an environment of its own. Its
# licence limits what it may be used for, and goes with the image. Its weights are not in the image: some are for
# non-commercial use only. It keeps them in /weights/models.
FROM ${FACEFUSION_PYTHON_IMAGE} AS facefusion-python
FROM facefusion-python AS build-facefusion-app
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV SBOM="cyclonedx-py environment --output-reproducible --output-file /opt/facefusion/sbom.json /opt/facefusion/.venv/bin/python"
COPY --from=facefusion-python /usr/local /opt/python3.12
COPY constraints.txt /src/
RUN pip install -c /src/constraints.txt cyclonedx-bom
# The commit of release 3.8.1.
ARG FACEFUSION_COMMIT=6f5e4b9d91e9caf5a5fbeb6d0f8aa1441b3ad1de
ADD https://github.com/facefusion/facefusion.git#${FACEFUSION_COMMIT} /opt/facefusion
WORKDIR /opt/facefusion
# As its install.py does for `cuda@12`, with CUDA's libraries. requirements.txt pins onnxruntime's build for the CPU.
RUN /opt/python3.12/bin/python3.12 -m venv .venv \
    && sed -i '/^onnxruntime/d' requirements.txt \
    && .venv/bin/pip install -r requirements.txt 'onnxruntime-gpu[cuda,cudnn]==1.24.4' \
    && ln -s /weights .assets \
    && $SBOM
FROM build AS build-facefusion-gpu
RUN pip install -c constraints.txt '.[worker,images,otel]' && $SBOM
FROM weights-worker AS facefusion-gpu
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends curl ffmpeg && rm -rf /var/lib/apt/lists/*
USER 65532:65532
COPY --from=facefusion-python /usr/local /opt/python3.12
COPY --from=build-facefusion-app /opt/facefusion /opt/facefusion
COPY --from=build-facefusion-gpu /opt/inferq /opt/inferq
ENV INFERQ_FACEFUSION_BACKEND=facefusion INFERQ_DEVICE=cuda INFERQ_FACEFUSION_HOME=/opt/facefusion
ENV NVIDIA_LIBRARIES=/opt/facefusion/.venv/lib/python3.12/site-packages/nvidia
ENV LD_LIBRARY_PATH=$NVIDIA_LIBRARIES/cublas/lib:$NVIDIA_LIBRARIES/cuda_nvrtc/lib:$NVIDIA_LIBRARIES/cuda_runtime/lib:$NVIDIA_LIBRARIES/cudnn/lib:$NVIDIA_LIBRARIES/cufft/lib:$NVIDIA_LIBRARIES/curand/lib:$NVIDIA_LIBRARIES/nvjitlink/lib
ENTRYPOINT ["inferq", "worker", "facefusion"]

FROM build AS build-echo
RUN pip install -c constraints.txt '.[worker,otel]' && $SBOM
FROM worker AS echo
COPY --from=build-echo /opt/inferq /opt/inferq
ENTRYPOINT ["inferq", "worker", "echo"]

FROM build AS build-callbacks
RUN pip install -c constraints.txt '.[worker,jobs,kubernetes,otel]' && $SBOM
FROM consumer AS callbacks
COPY --from=build-callbacks /opt/inferq /opt/inferq
ENTRYPOINT ["inferq"]
CMD ["callbacks"]

# For a plug-in's task type, build on this image and install the plug-in. API keys are in INFERQ_API_KEYS_FILE.
FROM build AS build-gateway
RUN pip install -c constraints.txt '.[gateway,otel]' && $SBOM
FROM runtime AS gateway
COPY --from=build-gateway /opt/inferq /opt/inferq
ENV HOME=/tmp INFERQ_GATEWAY_HOST=0.0.0.0 INFERQ_GATEWAY_PORT=8000
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["inferq", "gateway"]
