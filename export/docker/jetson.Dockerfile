# @NAME@ behind HTTP, on a Jetson. IMAGE must have the TensorRT that the plan was built with, and CUDA's headers (pycuda).
ARG IMAGE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel
FROM $IMAGE
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
COPY nformer_edge-@VERSION@.tar.gz /source/
# TensorRT's Python module is the image's own: the environment sees it, and pip installs no other.
RUN python3 -m venv --system-site-packages /app && /app/bin/python -c "import tensorrt; print(tensorrt.__version__)"
RUN /app/bin/pip install --no-cache-dir "/source/nformer_edge-@VERSION@.tar.gz[serve]" "pycuda>=2024.1"
RUN useradd --uid 1000 service && install -d -o service -m 700 /gallery
COPY model /model
USER service
VOLUME /gallery
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s CMD ["/app/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["/app/bin/nformer-edge", "serve", "/model", "--gallery", "/gallery"]
CMD ["--host", "0.0.0.0", "--tokens", "/run/secrets/tokens"]
