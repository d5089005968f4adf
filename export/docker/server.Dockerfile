# @NAME@ behind HTTP, on the CPU.
FROM docker.io/library/python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY nformer_edge-@VERSION@.tar.gz /source/
RUN python -m venv /app && /app/bin/pip install --no-cache-dir "/source/nformer_edge-@VERSION@.tar.gz[@EXTRA@,serve]"

FROM docker.io/library/python:3.12-slim
RUN useradd --uid 1000 service && install -d -o service -m 700 /gallery
COPY --from=build /app /app
COPY model /model
# The model's digests and golden vectors: an image that computes something else is not built.
RUN /app/bin/python -c "import nformer_edge as ne; print(ne.open('/model'))"
USER service
VOLUME /gallery
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s CMD ["/app/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["/app/bin/nformer-edge", "serve", "/model", "--gallery", "/gallery"]
CMD ["--host", "0.0.0.0", "--tokens", "/run/secrets/tokens"]
