FROM python:3.12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY native native
COPY kvindex_server kvindex_server
COPY kvindex_client kvindex_client
# Dependencies and the project become wheels here, so that the final stage needs no compiler.
RUN pip wheel --no-cache-dir --wheel-dir /wheels '.[kubernetes,tracing]'

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile --no-index --find-links /wheels 'kvindex-server[kubernetes,tracing]' \
    && python -m compileall -q "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# Nothing is written at run time: the root file system may be read-only.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENIZERS_PARALLELISM=false
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["kvindex-server"]
CMD ["serve"]
