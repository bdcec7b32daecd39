# A mirror or a digest of the same image: --build-arg BASE=...
ARG BASE=python:3.12-slim
FROM ${BASE} AS build
# Before anything is installed: these packages are what the last stage begins with.
RUN dpkg-query -W -f='${Package}\t${Version}\t${Architecture}\n' > /base-packages.tsv \
    && apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY native native
COPY kvindex_server kvindex_server
COPY kvindex_client kvindex_client
# Dependencies and the project become wheels once, and are installed from them alone.
RUN pip wheel --no-cache-dir --wheel-dir /wheels '.[kubernetes,store,tracing]'
RUN python -m venv --without-pip /opt/kvindex \
    && pip --python /opt/kvindex/bin/python install --no-cache-dir --no-compile --no-index --find-links /wheels \
       'kvindex-server[kubernetes,store,tracing]' \
    && /opt/kvindex/bin/python -m compileall -q /opt/kvindex/lib
COPY scripts/sbom.py scripts/sbom-requirements.txt scripts/
RUN python -m venv --without-pip /sbom \
    && pip --python /sbom/bin/python install --no-cache-dir -r scripts/sbom-requirements.txt \
    && /sbom/bin/python scripts/sbom.py --python /opt/kvindex/bin/python --packages /base-packages.tsv \
       /opt/kvindex/sbom.cdx.json

FROM ${BASE}
COPY --from=build /opt/kvindex /opt/kvindex
# Nothing is written at run time: the root file system may be read-only. The loader keeps few arenas (docs/image.md).
ENV PATH=/opt/kvindex/bin:$PATH \
    MALLOC_ARENA_MAX=2 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["kvindex-server"]
CMD ["serve"]
