#!/bin/bash
# Vast.ai's on-start script for the launch modes SSH and Jupyter, where the image's own entrypoint does not run. Vast runs
# it each time the container starts, so a machine that comes back goes on by itself. A second start does no harm: the
# run is locked. The variables of the template say what is trained. To pause it, log in, touch /workspace/STOP, and
# kill the process that start.log names.
cd /workspace || exit 1
nohup /opt/wmtp/entrypoint/start.sh --resume >>start.log 2>&1 &
echo "$(date -u +%FT%TZ) start.sh is process $!" >>start.log
