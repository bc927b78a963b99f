# sdlora in a container, with CUDA or for the CPU alone:
#   docker build -t sdlora .
#   docker build -t sdlora:cpu --build-arg DEVICE=cpu .
#   docker run --gpus all -p 127.0.0.1:7860:7860 -v "$PWD:/work" sdlora
#   docker run -p 127.0.0.1:7860:7860 -v "$PWD:/work" sdlora:cpu sdlora train my-images --name mine
# Without a command the page is served. A password of its own is made up at each start and printed; set one with
# -e SDLORA_UI_PASSWORD=... The NVIDIA driver of the machine must suit the index, as `sdlora doctor` says.
FROM python:3.12-slim

ARG DEVICE=cuda
# index of PyTorch for DEVICE=cuda: cu130 (driver 580 or newer), cu128 (570), cu126 (525)
ARG CUDA=cu130

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# Triton builds the launcher of each kernel with a C compiler; Python's headers are in the image
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi

WORKDIR /opt/sdlora
COPY constraints.txt ./
RUN if [ "$DEVICE" = cuda ]; then index=$CUDA; else index=cpu; fi \
    && pip install -c constraints.txt torch --index-url "https://download.pytorch.org/whl/$index" \
        --extra-index-url https://pypi.org/simple
COPY pyproject.toml README.md LICENSE NOTICE MANIFEST.in ./
COPY sdlora sdlora
COPY ui ui
COPY datasets datasets
COPY configs configs
RUN pip install -c constraints.txt ".[ui,optimizers,tagger,trackers]" \
    && sdlora --version

# whoever runs it (docker run --user) writes there; encodings and models stay between runs with -v NAME:/cache
ENV HOME=/cache SDLORA_CACHE_FOLDER=/cache/sdlora HF_HOME=/cache/huggingface
RUN mkdir -p /cache /work && chmod 777 /cache /work
WORKDIR /work
EXPOSE 7860
CMD ["sdlora", "ui", "--listen", "0.0.0.0"]
