#!/usr/bin/env bash
# The files of scripts/slurm/ under a real Slurm: one controller and two nodes on this machine's loopback, begun and
# ended here, in a folder of their own. Six minutes; no GPU, no account; nothing of an installed Slurm is touched.
#
#   scripts/test_slurm.sh             # PYTHON=… for another Python with sdo; KEEP=1 leaves the folder
#
# A line for every check. Ends with 0 all well, 1 a check failed, 77 Slurm is not installed.
# shellcheck disable=SC2329 # traps, `check` and `within` call functions by name
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
slurm=$root/scripts/slurm
export PATH=$PATH:/usr/sbin:/sbin

for program in slurmctld slurmd munged sbatch scontrol; do
    if ! command -v "$program" >/dev/null; then
        echo "skip $program is not installed: apt-get install slurm-wlm munge"
        exit 77
    fi
done

folder=$(mktemp -d -t sdo-slurm-XXXXXX)
# munged wants to be reached by everybody
chmod 711 "$folder"
daemons=() failed=0

within() { # seconds, command …: until it succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.3
    done
}
no_jobs() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }

clean() {
    trap - EXIT INT TERM
    # steps are no children of this shell: they end with their jobs
    scancel --user="$(id -un)" 2>/dev/null
    within 45 no_jobs
    # the daemons are, so their numbers are nobody else's before wait
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null; done
    wait
    if [[ -n ${KEEP:-} ]]; then echo "kept: $folder"; else rm -rf "$folder"; fi
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ---- a Slurm ----

read -r controller_port node_port other_port < <("$python" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')

mkdir "$folder"/{state,spool}
touch "$folder"/gpu{0,1}
(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
# The first node's name becomes MASTER_ADDR, so it must be known everywhere (localhost is special to Slurm).
# GPUs that are files, so that the shipped files are submitted as they are.
# A requeued job waits until its old credential is void: 5 seconds, not 120.
cat >"$folder/slurm.conf" <<X
ClusterName=sdo
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=127.0.0.1 NodeHostName=$(hostname) NodeAddr=127.0.0.1 Port=$node_port CPUs=8 Gres=gpu:2
NodeName=second NodeHostName=$(hostname) NodeAddr=127.0.0.1 Port=$other_port CPUs=8 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
X
echo "Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"
# whatever Slurm this shell may be part of
while read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|SDO)_')
export SLURM_CONF=$folder/slurm.conf

daemon() {
    "$@" >>"$folder/daemons.out" 2>&1 &
    daemons+=($!)
}
daemon munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
within 10 test -S "$folder/munge.socket"
daemon slurmctld -D
daemon slurmd -D -N 127.0.0.1
daemon slurmd -D -N second
both_idle() { [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null) == 2 ]]; }
if ! within 60 both_idle; then
    echo "FAIL Slurm does not start"
    tail -n 40 "$folder"/daemons.out
    exit 1
fi

# ---- runs ----

cd "$folder" || exit 1
# the checkout this script belongs to, whatever is installed
export SDO="$python -m sdo_cli" PYTHONPATH=$root OMP_NUM_THREADS=1
# gloo would look up the machine's name
export GLOO_SOCKET_IFNAME=lo

# A dozen quick steps; time to interrupt them comes from sleeping before every safe point, until a run has been resumed.
small=(--recipe quickstart max_train_steps=12 train_batch_size=2 num_inference_steps=3 checkpointing_steps=2
    validation.num_prompts=3 validation.grid_prompts=1 validation.grid_steps=0 validation.batch_size=1)
cat >slow.py <<'X'
import os
import time
from pathlib import Path

from sdo_cli.parallel import stopping

out = os.environ.get("SDO_OUT", "none") + "/" + os.environ.get("SLURM_ARRAY_TASK_ID", "")
if not any(Path(out).glob("checkpoints/*")):
    check = stopping.Stopping.check

    def slow_check(self):
        time.sleep(float(os.environ["SLOW"]))
        check(self)

    stopping.Stopping.check = slow_check
X

submit() { # name, file, words for sbatch …, --, words for the file …
    local name=$1 file=$2 sbatch=()
    shift 2
    while [[ $1 != -- ]]; do sbatch+=("$1") && shift; done
    shift
    SDO_OUT=$folder/$name SLOW=${SLOW:-2} sbatch --parsable --job-name="$name" --output="$name.out" --cpus-per-task=1 \
        "${sbatch[@]}" "$slurm/$file" "$@"
}
state() { scontrol show job --oneliner "$1" 2>/dev/null | grep -oP '\bJobState=\K\S+' | sort -u | paste -sd,; }
code() { scontrol show job --oneliner "$1" | grep -oP '\bExitCode=\K[0-9]+'; }
restarts() { scontrol show job --oneliner "$1" | grep -oP '\bRestarts=\K[0-9]+'; }

is_over() { [[ $(state "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY)?$ ]]; }
ended() { within 400 is_over "$1"; }
has_steps() { (($(cat "$1/metrics.jsonl" 2>/dev/null | wc -l) >= $2)); }
training() { within 200 has_steps "$@"; }
said() { grep -qE "$2" "$1.out"; }
finished() {
    grep -q '"status": "finished"' "$1/manifest.json" 2>/dev/null && [[ -s $1/pytorch_lora_weights.safetensors ]]
}

begin=$SECONDS
check() { # name of an output, sentence, command that must succeed …
    local out=$1 sentence=$2
    shift 2
    if "$@"; then
        echo "ok   $sentence ($((SECONDS - begin)) s)"
    else
        echo "FAIL $sentence"
        failed=1
        sed 's/^/     | /' "$out.out" | tail -n 30
    fi
}
same_weights() {
    "$python" - "$@" <<'X'
import sys

import torch
from safetensors.torch import load_file

first, *others = (load_file(f"{name}/pytorch_lora_weights.safetensors") for name in sys.argv[1:])
assert first and any(tensor.any() for tensor in first.values())
for other in others:
    assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)
X
}

# The wall: 3 minutes, the signal 120 seconds before it and up to 60 seconds earlier, so after 30 to 60 seconds. And a
# wall without a signal, which Slurm finds after 60 to 90. Both are mostly asleep, so they run beside the others.
wall=$(SLOW=6 SDO_DEVICES="" submit wall single_node.sbatch --time=3 -- "${small[@]}" --plugin slow.py)
hit=$(SLOW=8 SDO_DEVICES="" submit hit single_node.sbatch --time=1 --signal=USR1@0 -- "${small[@]}" --plugin slow.py)

alone=$(SDO_DEVICES="" submit alone single_node.sbatch -- "${small[@]}")
ended "$alone"
alone_well() { [[ $(state "$alone") == COMPLETED && $(restarts "$alone") == 0 ]] && finished alone; }
check alone "single node: to its end" alone_well

requeued=$(SDO_DEVICES="" submit requeued single_node.sbatch -- "${small[@]}" --plugin slow.py)
training requeued 3
scontrol requeue "$requeued"
ended "$requeued"
requeued_well() {
    [[ $(state "$requeued") == COMPLETED && $(restarts "$requeued") == 1 ]] && finished requeued &&
        said requeued 'stopped \(SIGTERM\)' && said requeued 'resumed from'
}
check requeued "scontrol requeue: saved, requeued, continued" requeued_well

ended "$wall"
wall_well() {
    [[ $(state "$wall") == COMPLETED && $(restarts "$wall") -ge 1 ]] && finished wall &&
        said wall 'stopped \(SIGUSR1\)' && said wall 'saved in .*; requeued' && said wall 'resumed from'
}
check wall "time limit: saved by --signal, requeued itself, continued" wall_well
ended "$hit"
hit_well() {
    [[ $(state "$hit") == COMPLETED && $(restarts "$hit") -ge 1 ]] && finished hit &&
        said hit 'DUE TO TIME LIMIT' && said hit 'stopped \(SIGTERM\)' && said hit 'resumed from'
}
check hit "time limit without --signal: saved, requeued itself, continued" hit_well
check wall "the same weights bit for bit: left alone, requeued, time limits" same_weights alone requeued wall hit

wrong=$(SDO_DEVICES="" submit wrong single_node.sbatch -- --recipe no-such-recipe)
ended "$wrong"
wrong_well() { [[ $(state "$wrong") == FAILED && $(code "$wrong") == 2 && $(restarts "$wrong") == 0 ]]; }
check wrong "bad input: exit code 2, not requeued" wrong_well

# before sdo listens a signal ends it; the job begins again, but not for ever
cat >early.py <<'X'
import time
from pathlib import Path

Path("early").touch()
time.sleep(60)
X
early=$(SDO_RESTARTS=1 SDO_DEVICES="" submit early single_node.sbatch -- "${small[@]}" --plugin early.py)
for _ in 1 2; do
    within 60 test -e early && rm early
    scancel --signal=USR1 "$early"
done
ended "$early"
early_well() { [[ $(state "$early") == FAILED && $(restarts "$early") == 1 ]] && said early 'that is enough'; }
check early "signals before sdo listens: requeued itself, no oftener than allowed" early_well

cancelled=$(SDO_DEVICES="" submit cancelled single_node.sbatch -- "${small[@]}" --plugin slow.py)
training cancelled 1
scancel "$cancelled"
ended "$cancelled"
# long enough for a job that rises again
sleep 8
cancelled_well() {
    [[ $(state "$cancelled") == CANCELLED && $(restarts "$cancelled") == 0 ]] &&
        said cancelled 'stopped \(SIGTERM\)' && ! said cancelled requeued
}
check cancelled "scancel: saved, and stays cancelled" cancelled_well

# two nodes with a task each, told to stop in the middle
several=$(submit several multi_node.sbatch -- "${small[@]}" train_batch_size=1 --plugin slow.py)
training several 3
scancel --signal=USR1 "$several"
ended "$several"
several_well() {
    [[ $(state "$several") == COMPLETED && $(restarts "$several") == 1 ]] && finished several &&
        said several '2 processes; a step is 2 samples' && said several 'stopped \(SIGUSR1\)' &&
        said several 'resumed from'
}
check several "multi node: two nodes, saved by a signal, requeued itself, continued" several_well

cat >dies.py <<'X'
import os

from sdo_cli.parallel import stopping

if os.environ["RANK"] == "1":
    stopping.Stopping.check = lambda self: os._exit(9)
X
dies=$(submit dies multi_node.sbatch -- "${small[@]}" train_batch_size=1 --plugin dies.py)
ended "$dies"
dies_well() { [[ $(state "$dies") == FAILED && $(restarts "$dies") == 0 ]] && said dies 'ended without a word'; }
check dies "multi node: a task that dies ends the other, not requeued" dies_well

# The number of an array's last task is that of the whole array: only the task may be requeued.
cat >lines.txt <<X
# a comment, and an empty line

seed=1 'description=in two words'
seed=2 --plugin slow.py
X
sweep=$(SDO_DEVICES="" submit sweep sweep.sbatch --array=1-2 -- lines.txt "${small[@]}")
training sweep/2 3
scancel --signal=USR1 "${sweep}_2"
ended "${sweep}_1"
ended "${sweep}_2"
sweep_well() {
    [[ $(state "${sweep}_1") == COMPLETED && $(restarts "${sweep}_1") == 0 ]] && finished sweep/1 &&
        [[ $(state "${sweep}_2") == COMPLETED && $(restarts "${sweep}_2") == 1 ]] && finished sweep/2 &&
        grep -q 'in two words' sweep/1/resolved.yaml && ! same_weights sweep/1 sweep/2 2>/dev/null
}
check sweep "sweep: two tasks with a folder each, one requeued itself, continued" sweep_well

exit $failed
