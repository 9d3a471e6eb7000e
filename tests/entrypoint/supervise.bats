# The restart policy and what goes with it: supervise.sh, with a `wmtp` that ends as each test says.

setup() {
  ROOT=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  cd "$BATS_TEST_TMPDIR"
  mkdir bin
  # `train` takes its exit code from the next line of `codes`; "wait" waits for a signal and ends with 75
  cat >bin/wmtp <<'WMTP'
#!/bin/bash
echo "$*" >>calls
case $1 in
train)
  code=$(head -n 1 codes) && sed -i 1d codes
  case $code in
  wait)
    trap 'echo INT >>signals; exit 75' INT
    trap 'echo TERM >>signals; exit 75' TERM
    echo $$ >pid.new && mv pid.new pid
    while :; do sleep 0.02; done
    ;;
  kill) kill -KILL $$ ;;
  *) exit "$code" ;;
  esac
  ;;
doctor) cat doctor 2>/dev/null; exit 78 ;;
host)
  # `stop` has the exit codes of the calls one after the other, the last one for all further ones
  code=$(head -n 1 "$2" 2>/dev/null || echo 0)
  if [[ -e $2 && $(wc -l <"$2") -gt 1 ]]; then sed -i 1d "$2"; fi
  exit "${code:-0}"
  ;;
esac
WMTP
  chmod +x bin/wmtp
  unset "${!WMTP_@}" "${!CLOUD_@}"
  export WMTP_WORKDIR=$PWD/work
  mkdir work
}

# supervise.sh's functions, then the code $1 with the rest as its arguments
with_functions() {
  bash -euo pipefail -c "source '$ROOT/entrypoint/lib.sh'; source '$ROOT/entrypoint/supervise.sh'; SHORTEST_PAUSE=0 ASK_AGAIN=${AGAIN:-0}
    $1" start.sh "${@:2}"
}

# the same in place of this shell, so that signals to its process id reach it: also SIGINT, which a shell cannot heed
# again once whoever runs these tests has it ignored, as for all that runs in the background
become() {
  local heed="import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
  exec python3 -c "$heed" bash -euo pipefail -c "source '$ROOT/entrypoint/lib.sh'; source '$ROOT/entrypoint/supervise.sh'
    SHORTEST_PAUSE=${PAUSE:-0} ASK_AGAIN=${AGAIN:-0}; read_policy; supervise bin/wmtp" start.sh 3>&- 2>words
}

# what start.sh does once there is an environment; the exit codes of the worker, then its arguments
supervised() {
  printf '%s\n' $1 >codes
  with_functions 'read_policy; refuse_if_stopped; supervise bin/wmtp "$@"' "${@:2}"
}

# the same in the background; returns when the worker is there
in_background() {
  printf '%s\n' $1 >codes
  set -m # Ctrl-C is ignored in the background otherwise
  become &
  supervisor=$!
  set +m
  until [ -e pid ]; do sleep 0.02; done
}

@test "74, 75 and a death that it could not help are worth a restart, nothing else is" {
  run with_functions 'for ((code = 0; code < 256; code++)); do is_worth_a_restart $code && echo $code; done; true'
  [ "$(echo $output)" = "74 75 132 134 135 136 137 139" ]
}

@test "pauses double from 5 seconds to 5 minutes" {
  run with_functions 'SHORTEST_PAUSE=5; for number in 1 2 3 4 5 6 7 8 99; do pause_before $number; done'
  [ "$(echo $output)" = "5 10 20 40 80 160 300 300 300" ]
}

@test "a worker is started again until it is done, from its newest checkpoint" {
  run supervised "75 74 kill 0" --preset smoke --resume never
  [ "$status" -eq 0 ]
  [ "$(grep -c '^train' calls)" -eq 4 ]
  [ "$(head -n 1 calls)" = "train --preset smoke --resume never" ]
  [ "$(grep -c -- '--resume never --resume auto$' calls)" -eq 3 ]
}

@test "no restart after any other exit code" {
  for code in 0 1 2 70 78 79 128 130 143; do
    run supervised $code
    [ "$status" -eq $code ]
  done
  [ "$(grep -c '^train' calls)" -eq 9 ]
}

@test "no restart with WMTP_RESTART=never" {
  WMTP_RESTART=never run supervised "75 0"
  [ "$status" -eq 75 ]
}

@test "a crash loop ends, with the worker's exit code" {
  WMTP_RESTART_LIMIT=2 run supervised "75 75 75 0"
  [ "$status" -eq 75 ]
  [[ "$output" == *"exit code 75; not started again: 2 restarts in 3600 s"* ]]
}

@test "restarts before the window are forgotten" {
  WMTP_RESTART_LIMIT=1 WMTP_RESTART_WINDOW=0 run supervised "75 75 75 0"
  [ "$status" -eq 0 ]
}

@test "SIGTERM reaches the worker at once and once, and nothing is started again" {
  in_background "wait 0"
  kill -TERM $supervisor
  wait $supervisor || status=$?
  [ "$status" -eq 75 ]
  [ "$(cat signals)" = TERM ]
  [ "$(grep -c '^train' calls)" -eq 1 ]
}

@test "Ctrl-C, which goes to the whole group, reaches the worker once" {
  in_background "wait 0"
  kill -INT -- -$supervisor
  wait $supervisor || status=$?
  [ "$status" -eq 75 ]
  sleep 0.1
  [ "$(cat signals)" = INT ]
}

@test "a worker that is killed beside its supervisor is started again" {
  in_background "wait 0"
  kill -KILL "$(cat pid)"
  wait $supervisor
  [ "$(grep -c '^train' calls)" -eq 2 ]
}

@test "a signal ends the pause before a restart" {
  printf '%s\n' 75 0 >codes
  set -m
  PAUSE=60 become &
  set +m
  until grep -q "starting again in 60 s" words 2>/dev/null; do sleep 0.02; done
  kill -TERM $!
  wait $! || status=$?
  [ "$status" -eq 75 ]
  [ "$(grep -c '^train' calls)" -eq 1 ]
}

@test "a signal that comes just before the waiting ends the pause too" {
  run with_functions 'wait() { kill -TERM $$; builtin wait "$@"; }
    trap "pass_on TERM" TERM
    wait_a_while 40; echo "$told after $((SECONDS < 20 ? 1 : SECONDS))"'
  [ "$output" = "1 after 1" ]
}

@test "nothing is started while the file STOP is there" {
  touch work/STOP
  run supervised 0
  [ "$status" -eq 78 ]
  [[ "$output" == *"$PWD/work/STOP is there, so nothing is started"*"-> remove it"* ]]
  [ ! -e calls ]
}

@test "the file STOP ends the restarts, and nothing is stopped then" {
  export WMTP_WHEN_IDLE=stop
  in_background "wait 0"
  touch work/STOP
  kill -KILL "$(cat pid)"
  wait $supervisor || status=$?
  [ "$status" -eq 137 ]
  [[ "$(cat words)" == *"not started again: $PWD/work/STOP is there"* ]]
  [ "$(grep -c "^host" calls)" -eq 0 ]
}

@test "no restart on a machine that is about to be taken away" {
  echo 75 >notices
  WMTP_WHEN_IDLE=stop run supervised "75 0"
  [ "$status" -eq 75 ]
  [[ "$output" == *"this machine is about to be taken away"* ]]
  [ "$(cat calls)" = "train
host notices" ]
}

@test "a cloud that does not say is no reason to stay down" {
  echo 70 >notices
  run supervised "75 0"
  [ "$status" -eq 0 ]
}

@test "the machine is stopped or destroyed after exit code 0, if that was asked for" {
  run supervised 0
  [ "$(grep -c "^host stop" calls)" -eq 0 ]
  WMTP_WHEN_IDLE=stop run supervised 0
  [ "$(grep -c "^host stop" calls)" -eq 0 ]
  WMTP_WHEN_DONE=stop run supervised 0
  [ "$(tail -n 1 calls)" = "host stop" ]
  WMTP_WHEN_DONE=destroy run supervised 0
  [ "$(tail -n 1 calls)" = "host stop --destroy" ]
}

@test "a machine whose work is not safe is never destroyed, and stopped only if that was asked for" {
  export WMTP_RESTART_LIMIT=0
  for code in 70 74 75 78 137; do
    rm -f calls
    WMTP_WHEN_DONE=destroy run supervised $code
    [ "$status" -eq $code ]
    [ "$(cat calls)" = train ]
    WMTP_WHEN_DONE=destroy WMTP_WHEN_IDLE=stop run supervised $code
    [ "$(tail -n 1 calls)" = "host stop" ]
  done
}

@test "a machine that another worker uses, or that somebody stopped by hand, is left alone" {
  export WMTP_WHEN_DONE=destroy WMTP_WHEN_IDLE=stop
  run supervised 79
  [ "$status" -eq 79 ]
  rm -f pid
  in_background "wait 0"
  kill -TERM $supervisor
  wait $supervisor || true
  [ "$(grep -c "^host" calls)" -eq 0 ]
}

@test "a host that refuses changes no exit code, and is not passed over in silence" {
  echo 78 >stop
  WMTP_WHEN_DONE=stop run supervised 0
  [ "$status" -eq 0 ]
  [[ "$output" == *"this machine is still there, and may cost money"* ]]
}

@test "a host that cannot be reached is asked again until it answers, or refuses" {
  printf '%s\n' 75 75 0 >stop
  WMTP_WHEN_DONE=stop run supervised 0
  [ "$status" -eq 0 ]
  [ "$(grep -c "^host stop" calls)" -eq 3 ]
  [[ "$output" == *"asking again in 0 s"* ]]
  printf '%s\n' 75 78 0 >stop
  WMTP_WHEN_IDLE=stop run supervised 70
  [ "$status" -eq 70 ]
  [ "$(grep -c "^host stop" calls)" -eq 5 ]
}

@test "a signal, or the file STOP, ends the asking" {
  echo 75 >stop
  export WMTP_WHEN_DONE=stop
  echo 0 >codes
  AGAIN=60 become &
  until grep -q "asking again in 60 s" words 2>/dev/null; do sleep 0.02; done
  kill -TERM $!
  wait $!
  [ "$(grep -c "^host stop" calls)" -eq 1 ]
  echo 0 >codes
  AGAIN=1 become &
  until [ "$(grep -c "^host stop" calls)" -ge 2 ]; do sleep 0.02; done
  touch work/STOP
  wait $!
}

@test "a run that is held elsewhere leaves this machine idle, one that is held here does not" {
  export WMTP_WHEN_DONE=destroy WMTP_WHEN_IDLE=stop
  mkdir -p work/checkpoints/run
  touch work/checkpoints/run/.lock
  (
    flock 8
    run supervised 79
    [ "$status" -eq 79 ]
    [ "$(grep -c "^host" calls)" -eq 0 ]
  ) 8<work/checkpoints/run/.lock
  run supervised 79
  [ "$status" -eq 79 ]
  [ "$(tail -n 1 calls)" = "host stop" ]
}

@test "a machine on which another worker holds a run is left alone, whatever the exit code" {
  export WMTP_WHEN_DONE=destroy WMTP_WHEN_IDLE=stop WMTP_RESTART_LIMIT=0
  mkdir -p work/checkpoints/run work/checkpoints/test elsewhere
  touch work/checkpoints/run/.lock work/checkpoints/test/.lock
  (
    flock 8
    for code in 0 70 74 75 78 79 137; do
      run supervised $code
      [ "$status" -eq $code ]
    done
    # also where it trains in the container's work directory, and this one was told another
    printf '%s\0' "WMTP_WORKDIR=$WMTP_WORKDIR" >first
    WMTP_WORKDIR=elsewhere run with_functions 'adopt_environment first; read_policy; leave bin/wmtp 0'
    [[ "$output" == *"not stopped: another worker trains on it" ]]
  ) 8<work/checkpoints/run/.lock
  [ "$(grep -c "^host" calls)" -eq 0 ]
  WMTP_WORKDIR=elsewhere run with_functions 'adopt_environment first; read_policy; leave bin/wmtp 0'
  [ "$(grep -c "^host stop --destroy" calls)" -eq 1 ]
}

@test "a host that could not be reached is not asked again once another worker trains" {
  export WMTP_WHEN_DONE=destroy
  mkdir -p work/checkpoints/run
  echo 75 >stop
  run with_functions 'read_policy
    wait_a_while() { touch work/checkpoints/run/.lock; exec 8<work/checkpoints/run/.lock; flock 8; }
    leave bin/wmtp 0'
  [ "$status" -eq 0 ]
  [ "$(grep -c "^host stop" calls)" -eq 1 ]
}

# start.sh itself with the arguments, in the image
start() { PATH=$PWD/bin:$PATH WMTP_IMAGE=1 bash "$ROOT/entrypoint/start.sh" "$@"; }

@test "nothing is started on a rented machine that is not fit, and it does not idle" {
  printf '%s\n' "pass  host            vast 4242" "fail  driver          too old  -> another machine" >doctor
  echo 0 >codes
  WMTP_WHEN_IDLE=stop run start --run-name r --preset smoke --set a=b --resume
  [ "$status" -eq 78 ]
  [[ "$output" == "fail  driver  "*"-> another machine"*"WMTP_DOCTOR=never"* ]]
  [ "$(cat calls)" = "doctor --quick --preset smoke --set a=b
host stop" ]
  WMTP_DOCTOR=never run start
  [ "$status" -eq 0 ]
  [ "$(tail -n 1 calls)" = train ]
}

@test "a doctor that finds nothing, cannot look, or looks at a machine of one's own keeps nothing from starting" {
  for found in "" "pass  host            vast 4242" $'pass  host            bare (no)\nfail  driver          too old'; do
    echo "$found" >doctor
    echo 0 >codes
    run start --preset
    [ "$status" -eq 0 ]
    [ "$(tail -n 1 calls)" = "train --preset" ]
  done
}

@test "start.sh becomes wmtp where nothing follows" {
  echo wait >codes
  PATH=$PWD/bin:$PATH WMTP_IMAGE=1 WMTP_RESTART=never bash "$ROOT/entrypoint/start.sh" 3>&- &
  until [ -e pid ]; do sleep 0.02; done
  [ "$(cat pid)" -eq $! ]
  kill -TERM $!
  wait $! || status=$?
  [ "$status" -eq 75 ]
}

@test "wrong values are one clear error before anything starts" {
  WMTP_WHEN_DONE=explode run supervised 0
  [ "$status" -eq 78 ]
  [[ "$output" == *"WMTP_WHEN_DONE=explode is none of: nothing stop destroy"* ]]
  WMTP_WHEN_IDLE=destroy run supervised 0
  [ "$status" -eq 78 ]
  WMTP_RESTART_LIMIT=-1 run supervised 0
  [ "$status" -eq 78 ]
  [ ! -e calls ]
}

@test "the policy may stand in .env; the environment wins" {
  cat >.env <<'ENV'
# WMTP_RESTART=always
export WMTP_RESTART="never"
WMTP_RESTART_LIMIT=3   # of them
WMTP_WHEN_DONE='stop'
ENV
  run with_functions 'read_policy; echo $WMTP_RESTART $WMTP_RESTART_LIMIT $WMTP_WHEN_DONE'
  [ "$output" = "never 3 stop" ]
  WMTP_RESTART=always run with_functions 'read_policy; echo $WMTP_RESTART'
  [ "$output" = always ]
}

@test "what a session by ssh lacks is taken over from the container's first process" {
  printf '%s\0' WMTP_IMAGE=1 PATH=/image/bin CLOUD_BUCKET=theirs "AWS_SECRET_ACCESS_KEY=a b
c" CONTAINER_ID=7 'HOME=/root' 'BASH_FUNC_x%%=() { :; }' >first
  CLOUD_BUCKET=ours run with_functions 'adopt_environment first
    env | grep -E "^(CLOUD_BUCKET|CONTAINER_ID)=" | sort; echo "$AWS_SECRET_ACCESS_KEY"; echo "$PATH" | cut -c 1-11; echo "$HOME"'
  [ "$output" = "CLOUD_BUCKET=ours
CONTAINER_ID=7
a b
c
/image/bin:
$HOME" ]
}

@test "of what the container was started with all that a worker heeds is taken over, and nothing else" {
  heeded="CUDA_VISIBLE_DEVICES HTTPS_PROXY NCCL_P2P_DISABLE OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF
    RAYON_NUM_THREADS TORCH_NCCL_TRACE_BUFFER_SIZE http_proxy no_proxy"
  for name in $heeded NVIDIA_VISIBLE_DEVICES my_proxy LD_PRELOAD OMP_NUM_THREADS_; do printf '%s=1\0' $name; done >first
  printf '%s\0' CONTAINER_ID=7 >>first
  run env -i PATH="$PATH" bash -c "source '$ROOT/entrypoint/supervise.sh'; adopt_environment first; env"
  [ "$(grep '=1$' <<<"$output" | grep -v ^SHLVL | cut -d = -f 1 | LC_ALL=C sort)" = "$(printf '%s\n' $heeded)" ]
}

@test "nothing is taken over where nothing was hidden, or may be read" {
  printf '%s\0' CLOUD_BUCKET=theirs >first
  run with_functions 'adopt_environment first; adopt_environment nowhere; echo "<${CLOUD_BUCKET-}>"'
  [ "$output" = "<>" ]
  printf '%s\0' CONTAINER_ID=7 CLOUD_BUCKET=theirs >first
  CONTAINER_ID=7 run with_functions 'adopt_environment first; echo "<${CLOUD_BUCKET-}>"'
  [ "$output" = "<>" ]
}
