#!/bin/sh
# Run the tests that need Ultralytics, outside of CI: it is large, and brings OpenCV and polars.
set -e
cd "$(dirname "$0")/../.."
python -m pip install --quiet "ultralytics>=8.3" cloudpickle
exec python -m pytest -n 0 -W default tests/integrations "$@"
