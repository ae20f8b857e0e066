#!/usr/bin/env bash
# From a bare machine to a record folder: environment, shards, pre-flight, smoke test, one run for
# each seed, the folder. Every stage skips what is done, so after any interruption run it again.
#
#   VOCAB=scylla.yaml AUTHOR="Your Name" GITHUB_ID=handle ./run_8xh100.sh  the record, on 8xH100
#   PRESET=frontier AUTHOR="Your Name" GITHUB_ID=handle ./run_8xh100.sh    with what was found later
#   PRESET=demo AUTHOR="Your Name" GITHUB_ID=handle ./run_8xh100.sh        the same in small, no GPU
#
# It needs Linux, bash 4.4 and Python 3.11, or newer ones. Environment variables set it:
#
#   variable      default           meaning
#   AUTHOR        required          your name, for submission.json
#   GITHUB_ID     required          your GitHub handle, for submission.json
#   VOCAB         required          vocabulary, a path or URL; not for the demo or with DATA_PATH.
#                                   Left out with PRESET=frontier, one of 1,254 ids with lossless
#                                   case is built
#   VOCAB_SHA256  Scylla's          SHA-256 of VOCAB; set it for a vocabulary of your own
#   PRESET        record            record, published, frontier, or demo, which brings a text of its
#                                   own; or several, such as frontier,demo, of which later ones win
#   SEEDS         42 1337 2024      one run for each of them
#   DATA_DIR      data/record       folder for all that is made: shards, runs, logs
#   SP1024        download          the folder "data" that the challenge's download script filled
#   SHARDS        80                training shards to use, of SP1024 or the download
#   DATA_PATH     made              folder of re-tokenized shards; nothing is fetched then
#   NPROC         all GPUs, else 1  processes on this machine
#   NNODES        1                 machines; start the script on each of them, with
#   NODE_RANK     0                 the number of the machine, from 0, and
#   RDZV_ENDPOINT none              host:port of the first machine
#   CUDA_VISIBLE_DEVICES  all       GPUs to use; empty for the CPU
#   RECORD_NAME   PROTEUS           name in the folder's name; Demo for the demo
#   TRACK         track_10min_16mb  track_non_record_16mb for the demo and every other run
#   RECORDS       records           folder of the tracks
#   ABOUT         none              file with a text on your idea, for the README of the folder
#   AGAINST       none              result to test against: a published name, or a folder
#   PRICE         3.00              dollars for one GPU and hour, for the estimate of the cost
#   PYTHON        makes .venv       interpreter that has everything of requirements.txt
#   FA3_INDEX     two pages         page of FlashAttention-3 wheels
#   PREFLIGHT     none              arguments of pytest for the pre-flight
#
# Every setting of train_gpt.py can be set in the same way. Relative paths start at this folder.
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
cd "$root"
if [[ $# != 0 ]]; then  # --help, or a mistake: settings come from the environment
    sed -n '2,/^set /s/^# \{0,1\}//p' "$root/${0##*/}"
    [[ $* == --help || $* == -h ]] && exit || exit 1
fi
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
[[ $(uname) == Linux && $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -ge 404 ]] || die "this script \
needs Linux and bash 4.4 or newer, not $(uname) and bash $BASH_VERSION; train_gpt.py runs without it"
DATA_DIR=${DATA_DIR:-data/record} node=${NODE_RANK:+_node$NODE_RANK}
(mkdir -p "$DATA_DIR" && test -w "$DATA_DIR") 2> /dev/null ||
    die "DATA_DIR=$DATA_DIR cannot be made or written to; set one that can"
DATA_DIR=$(cd "$DATA_DIR" && pwd)
log=$DATA_DIR/run_$(date +%Y-%m-%d_%H%M%S)$node.log
advice=''
if [[ ( -t 0 || -t 1 ) && -n ${SSH_CONNECTION:-} && -z ${TMUX:-}${STY:-} ]]; then
    advice="note: the script ends if the ssh connection breaks; started inside tmux, it goes on"
fi
exec 3>&1 4>&2 > >(tee -ia "$log") 2>&1
tee=$! current='' since=0 times=() complete='' child=''
export PYTHONUNBUFFERED=1  # what goes into a pipe is printed late otherwise
stage() {  # the name of a stage that begins; the one before it has ended
    local took="$(((SECONDS - since) / 60)) min $(((SECONDS - since) % 60)) s"
    [[ -z $current ]] || { echo "-- $current: $took"; times+=("$took" "$current"); }
    current=$1 since=$SECONDS
    [[ -z $current ]] || printf '\n== %s\n' "$current"
}
finish() {  # at every end, also after an error or a signal; the exit status stays as it is
    set +e
    if [[ -n $child ]] && kill "$child" 2> /dev/null; then wait "$child"; fi
    [[ -n $complete ]] || current="$current (stopped here)"
    stage ''
    printf '\nTime of each stage:\n'
    printf '%12s  %s\n' "${times[@]}"
    echo "All of this output is in $log"
    exec >&3 2>&4
    for _ in {1..100}; do  # until all is written; a process that was left behind may write on
        kill -0 "$tee" 2> /dev/null || break
        sleep 0.05
    done
}
trap finish EXIT
echo "This output also goes to $log${advice:+$'\n'$advice}"

stage "1 machine and settings"
SEEDS=${SEEDS:-42 1337 2024} NNODES=${NNODES:-1} PRICE=${PRICE:-3.00}
VOCAB_SHA256=${VOCAB_SHA256:-a0177241aca1871f861fec49b7f1ee737d029e8e09e320b0efd5d5ea7bee5517}
devices=$(nvidia-smi -L 2>/dev/null || true)
gpus=$(grep -c '^GPU' <<< "$devices" || true)
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then  # empty or -1 asks for the CPU
    listed=$(tr ',' '\n' <<< "${CUDA_VISIBLE_DEVICES#-1}" | grep -c '[^ ]' || true)
    gpus=$((listed < gpus ? listed : gpus))
fi
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [[ ${PRESET:-} == *demo* ]]; then kind=non_record; name=Demo; else kind=10min; name=PROTEUS; fi
TRACK=${TRACK:-track_${kind}_16mb} RECORD_NAME=${RECORD_NAME:-$name}
demo_text=''
if [[ ${PRESET:-} == *demo* && -z ${SHARDS:-}${DATA_PATH:-}${SP1024:-} ]]; then demo_text=1; fi
SHARDS=${SHARDS:-80}
echo "$gpus GPUs, $NPROC processes on $NNODES machines, seeds $SEEDS"
for name in NPROC NNODES SHARDS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name}: must be a whole number above 0"
done
[[ $SEEDS =~ ^[0-9]+(\ +[0-9]+)*$ && -z $(tr -s ' ' '\n' <<< "$SEEDS" | sort | uniq -d) ]] ||
    die "SEEDS=$SEEDS: must be different numbers with blanks between them, such as '42 1337 2024'"
[[ $TRACK =~ ^track_(10min|non_record)_16mb$ ]] || die "TRACK=$TRACK: must be track_10min_16mb or \
track_non_record_16mb"
[[ $PRICE =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "PRICE=$PRICE: must be dollars an hour, such as 3.00"
for name in DATA_PATH SP1024 ABOUT VOCAB; do
    [[ -z ${!name:-} || -e ${!name} || $name=${!name} == VOCAB=http?(s)://* ]] ||
        die "$name=${!name}: there is no such file; correct it, or leave it out"
done
[[ -n ${AUTHOR:-} && -n ${GITHUB_ID:-} ]] || die "AUTHOR and GITHUB_ID are not set; they go into \
submission.json: AUTHOR='Your Name' GITHUB_ID=handle $0"
[[ $gpus -gt 0 || -n ${PRESET:-} ]] || die "nvidia-smi shows no GPU to use; run on 8xH100, or try \
everything in small with PRESET=demo"
[[ $gpus == 0 || $NPROC -le $gpus ]] || die "NPROC=$NPROC, but there are $gpus GPUs to use; leave \
NPROC out"
[[ $NNODES == 1 || ( -n ${RDZV_ENDPOINT:-} && -n ${NODE_RANK:-} ) ]] || die "NNODES=$NNODES needs \
RDZV_ENDPOINT=host:port of the first machine, and on each machine its NODE_RANK, from 0"
NODE_RANK=${NODE_RANK:-0}
if [[ $TRACK == track_10min_16mb ]]; then
    [[ $devices == *H100* && $((NPROC * NNODES)) == 8 ]] || die "a record runs on 8 ranks on H100s, \
not on $((NPROC * NNODES)) on ${devices%%$'\n'*}; to run all the same, set TRACK=track_non_record_16mb"
fi
sp1024=${SP1024:-$DATA_DIR/datasets} built='' name=${VOCAB:-scylla.yaml}
if [[ ${PRESET:-} == *frontier* && -z ${VOCAB:-}${DATA_PATH:-}$demo_text ]]; then
    built=1 name=case1254.yaml
fi
name=${name%%\?*} name=${name##*/}
retokenized=$DATA_DIR/${name%.*}  # folder of the re-tokenized shards
vocabulary=$retokenized.yaml
data=$((1 + SHARDS * 42 / 100))  # GB: shards before and after re-tokenizing, and the runs
count() { { compgen -G "$1/fineweb_train_*.bin" || true; } | wc -l; }
if [[ -n ${DATA_PATH:-}$demo_text ]]; then
    data=1
elif [[ -n ${SP1024:-} ]]; then
    sp1024=$(cd "$SP1024" && pwd) data=$((1 + SHARDS * 21 / 100))
    have=$(count "$sp1024/datasets/fineweb10B_sp1024")
    [[ $have -ge $SHARDS ]] || die "SP1024=$SP1024 has $have training shards in \
datasets/fineweb10B_sp1024, SHARDS=$SHARDS are wanted; download more, or lower SHARDS"
fi
has_hash() { sha256sum -c --status <<< "$VOCAB_SHA256  $1" 2> /dev/null; }
[[ -n ${VOCAB:-}${DATA_PATH:-}$demo_text$built ]] || has_hash "$vocabulary" || die "VOCAB is not \
set: give the path or URL of the byte-exact revision of Scylla (a YAML file of 1254 ids, sha256 \
$VOCAB_SHA256, in pull request 1314 of github.com/openai/parameter-golf), or make a vocabulary of \
your own with retokenize_scylla.py --build-vocab and set VOCAB_SHA256 as well"
room() {  # folder, GB, remedy
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }')
    [[ $free -ge $2 ]] || die "$1 has $free GB free, about $2 are needed; $3"
}
room "$DATA_DIR" "$data" "set DATA_DIR to a larger disk, or lower SHARDS=$SHARDS"
estimate() {  # minutes of each stage, were nothing done yet, and the cost
    local environment=5 fetch=0 convert=0 smoke=10 each=$((14 + 80 / (NPROC * NNODES))) seeds
    local price=$PRICE about="10 training, up to $((each - 14)) evaluation, 4 start and export"
    seeds=$(wc -w <<< "$SEEDS")
    [[ -z ${PYTHON:-} ]] || environment=0
    [[ -n ${SP1024:-}${DATA_PATH:-}$demo_text ]] || fetch=$((SHARDS / 15 + 1))
    [[ -n ${DATA_PATH:-}$demo_text ]] || convert=$((SHARDS / 12 / $(nproc) + 1 + 3 * ${built:-0}))
    if [[ ${PRESET:-} == *demo* ]]; then smoke=1 each=6 price=0 about="on two idle CPU cores"; fi
    echo "An estimate of the time, not a measurement; what is done already is skipped:"
    awk -v price="$price" -v gpus=$((NPROC * NNODES)) '{
    minutes = $1; sum += minutes; $1 = ""; printf "%6d min %s\n", minutes, $0
} END {
    printf "%6d min  in all", sum
    if (price) printf ", some %.0f dollars: %d GPUs at %s an hour each (PRICE; 3.00 is an " \
                      "assumption)", sum / 60 * gpus * price, gpus, price
    print ""
}' <<< "$environment environment
$fetch download of shards, at 50 MB/s
$convert ${built:+building a vocabulary and }re-tokenizing, on $(nproc) cores
2 pre-flight
$smoke smoke test, with compilation
$((seeds * each)) $seeds seeds, each $each minutes ($about)"
}
[[ $gpus == 0 && ${PRESET:-} != *demo* ]] || estimate  # a CPU takes days for a large model

stage "2 environment"
list_settings() {  # of train_gpt.py, by an interpreter; wrong ones end the script, as does a torch
    # that does not see the GPUs
    LOCAL_WORLD_SIZE=$NPROC LOCAL_RANK=$((NPROC - 1)) "$1" -c 'import os, train_gpt as t
try: print(t.settings_listing(t.Config.from_env(os.environ, t.find_gpu(os.environ))))
except t.RunError as error: raise SystemExit(f"error: {error}")'
}
make_environment() {  # .venv: with the torch that it or python3 has, if that serves, else with its own
    local edit='' disk=7 site='' driver
    local torch='import torch; raise SystemExit(torch.__version__ < "2.9.0a0")'
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "python3 is \
$(python3 --version 2>&1 || echo missing); Python 3.11 or newer is needed"
    if .venv/bin/python -c "$torch" 2> /dev/null; then
        echo "what .venv lacks is added to it"
        edit='/^torch/d' disk=1 site=kept
    elif python3 -c "$torch" 2> /dev/null; then
        python3 -c 'import numpy' || die "python3 has torch but not numpy: pip install numpy"
        list_settings python3 > /dev/null
        echo "the torch of python3 is used; everything else goes into .venv"
        edit='/^torch/d' disk=1 site=--system-site-packages
    else
        driver=$({ nvidia-smi -q || true; } 2> /dev/null |
            sed -n 's/^Driver Version *: *\([0-9]*\).*/\1/p')
        [[ ${driver:-580} -ge 580 ]] || edit='/^torch/s/$/,<2.11/'  # from 2.11 on made for CUDA 13
        echo "python3 has no torch of 2.9 or newer: one for driver ${driver:-none} goes \
into .venv ($(sed -n "$edit; /^torch/p" requirements.txt))"
    fi
    # du: 6.3 GB with torch for CUDA 13, 1.4 with a torch for CPUs, 0.5 without torch
    [[ $(stat -c %d "$root") != $(stat -c %d "$DATA_DIR") ]] || disk=$((disk + data))
    room "$root" "$disk" "make room, or set PYTHON to an interpreter with everything installed"
    # shellcheck disable=SC2086
    [[ $site == kept ]] || python3 -m venv --clear $site .venv ||
        die "no venv module; on Debian: apt-get install python3-venv"
    .venv/bin/pip install -q -r <(sed "$edit" requirements.txt)
    touch "$stamp"
}
own=''
if [[ -z ${PYTHON:-} ]]; then
    own=1 PYTHON=$root/.venv/bin/python
    stamp=.venv/.installed-$(sha256sum requirements.txt | cut -c1-16)
    [[ -e $stamp ]] || make_environment
fi
[[ $PYTHON != */* ]] || PYTHON=$(realpath -s "$PYTHON")  # the runs start in another folder
"$PYTHON" -c 'import torch, numpy, sentencepiece, numba, huggingface_hub, matplotlib
import python_minifier, pytest, sys, yaml
print("python", sys.version.split()[0], "with torch", torch.__version__, "in", *torch.__path__)' ||
    die "$PYTHON lacks a package; $PYTHON -m pip install -r requirements.txt"
list_settings "$PYTHON" > /dev/null  # before anything is fetched
[[ -z ${AGAINST:-} ]] || "$PYTHON" records/make_record.py compare "$AGAINST" > /dev/null ||
    die "AGAINST=$AGAINST names no result to test against"
get_flash_attention() {  # 3, built for our torch and CUDA; without it, cuDNN's attention serves
    local cuda torch page
    read -r torch cuda < <("$PYTHON" -c 'import torch
print(torch.__version__.split("+")[0], torch.version.cuda)' | tr -d .)
    for page in ${FA3_INDEX:-https://download.pytorch.org/whl/cu$cuda/flash-attn-3/ \
            https://windreamer.github.io/flash-attention3-wheels/cu${cuda}_torch$torch}; do
        timeout 120 "$PYTHON" -m pip install -q --no-deps --no-index --retries 0 \
            --find-links "$page" flash_attn_3 && "$PYTHON" -c 'import flash_attn_interface' &&
            { echo "FlashAttention-3 is installed, from $page"; return; }
        echo "note: no FlashAttention-3 from $page"
    done
    echo "note: cuDNN's attention will do; FA3_INDEX=page looks for FlashAttention-3 elsewhere"
}
if [[ -n $own && $gpus -gt 0 && $devices == *H[12]00* ]]; then
    "$PYTHON" -c 'import flash_attn_interface' 2> /dev/null || get_flash_attention
fi
if [[ $TRACK == track_10min_16mb ]]; then
    reasons=$("$PYTHON" -c 'import os, tempfile, train_gpt as t
c = t.Config.from_env(os.environ, t.find_gpu(os.environ))
os.chdir(tempfile.mkdtemp())  # for its log
try: print("reasons:", "; ".join(t.Runtime(c).handicaps()))
except t.RunError as error: raise SystemExit(f"error: {error}")')
    reasons=$(sed -n 's/^reasons: *//p' <<< "$reasons")
    [[ -z $reasons ]] || die "a record would be ruined: $reasons. Mend that, or run all the same \
with TRACK=track_non_record_16mb"
fi

get_vocabulary() {  # a copy of VOCAB, checked
    if [[ $VOCAB == http?(s)://* ]]; then
        "$PYTHON" -c 'import sys, urllib.request as u; u.urlretrieve(*sys.argv[1:])' "$VOCAB" \
            "$vocabulary.part" 2>&1 | tail -n 1 || die "cannot download VOCAB=$VOCAB; give a path"
    else
        cp "$VOCAB" "$vocabulary.part"
    fi
    has_hash "$vocabulary.part" || die "VOCAB=$VOCAB has sha256 \
$(sha256sum "$vocabulary.part" | cut -c1-64), expected $VOCAB_SHA256; get the byte-exact revision \
(1254 ids), or set VOCAB_SHA256 for a vocabulary of your own"
    mv "$vocabulary.part" "$vocabulary"
}

stage "3 shards"
if [[ -n $demo_text ]]; then
    "$PYTHON" -c 'from records.demo_data import *; build_demo(Path("data/demo"))'
    DATA_PATH=data/demo/scylla
elif [[ -z ${DATA_PATH:-} ]]; then
    have=$(count "$retokenized")
    [[ $have -le $SHARDS ]] || die "$retokenized holds $have training shards, and all would be \
used: set DATA_DIR to another folder for SHARDS=$SHARDS"
    # first: it is small, and the shards are not
    [[ -n $built ]] || has_hash "$vocabulary" || get_vocabulary
    [[ -n ${SP1024:-} ]] || "$PYTHON" records/fetch.py --output "$DATA_DIR" --shards "$SHARDS"
    train=("$sp1024"/datasets/fineweb10B_sp1024/fineweb_train_*.bin)
    rm -rf "$DATA_DIR/chosen" && mkdir "$DATA_DIR/chosen"  # links to the first SHARDS
    ln -s "${train[@]:0:SHARDS}" "$sp1024"/datasets/fineweb10B_sp1024/fineweb_val_*.bin \
        "$DATA_DIR/chosen"
    [[ -z $built || -e $vocabulary ]] || "$PYTHON" retokenize_scylla.py --build-vocab 1254 \
        --build-rounds 24 --case ascii --output "$vocabulary" --sp-shards "${train[0]}" \
        --sp-model "$sp1024/tokenizers/fineweb_1024_bpe.model" || die "no vocabulary was built"
    "$PYTHON" retokenize_scylla.py --vocab "$vocabulary" --output-dir "$retokenized" \
        --sp-shards "$DATA_DIR/chosen/fineweb_*.bin" \
        --sp-model "$sp1024/tokenizers/fineweb_1024_bpe.model" ||
        die "the shards were not made; another VOCAB needs another name, or another DATA_DIR"
    DATA_PATH=$retokenized
fi
DATA_PATH=$(cd "$DATA_PATH" && pwd)
export DATA_PATH

stage "4 settings, data and code"
settings=$(list_settings "$PYTHON")
shards=$(cd "$DATA_PATH" && { cat manifest.json 2>/dev/null || true; wc -c ./*.bin; } | sha256sum)
key=$( (sha256sum < train_gpt.py; echo "$settings $NPROC $NNODES $shards") | sha256sum | cut -c1-12)
runs=$DATA_DIR/runs/$key
mkdir -p "$runs/logs"
# the runs start in $runs; a log then names no folder of this machine
DATA_PATH=$("$PYTHON" -c 'import os, sys; print(os.path.relpath(*sys.argv[1:]))' "$DATA_PATH" "$runs")
[[ $gpus == 0 ]] || nvidia-smi -q > "$runs/nvidia-smi$node.txt"
"$PYTHON" records/pack.py train_gpt.py --output "$runs/train_gpt.py"

stage "5 pre-flight on the CPU"
if [[ ! -e $runs/preflight.done ]]; then
    # shellcheck disable=SC2046,SC2086
    env $(sed 's/=.*//; s/^/-u /' <<< "$settings") CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q \
        test_cpu.py ${PREFLIGHT:-} || die "the pre-flight failed; nothing was run on GPUs"
    touch "$runs/preflight.done"
fi

given=()  # NAME=value for what runs on all ranks
on_all_ranks() {  # RUN_ID, a program and its arguments; in the runs' folder
    local where=(--standalone) status=0
    [[ $NNODES == 1 ]] || where=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --rdzv_backend=c10d
                                 --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="$1")
    (cd "$runs" && exec env "${given[@]}" "$PYTHON" -m torch.distributed.run "${where[@]}" \
        --nproc_per_node="$NPROC" "${@:2}") &
    child=$!  # which ends if the script does
    wait "$child" || status=$?
    child=''
    return "$status"
}
launch() {  # RUN_ID, then settings: the packed script
    local id=$1 given=(RUN_ID="$1" ARTIFACT_PATH="$1.ptz" "${@:2}")
    # of an attempt that failed
    for old in "$runs/logs/$id".{txt,jsonl} "$runs"/{,data/}checkpoints/"$id"; do
        [[ ! -e $old ]] || mv "$old" "$old.failed_$(date +%s)"
    done
    on_all_ranks "$id" train_gpt.py || return 1
    touch "$runs/$id.done"  # the only trace of a run on machines that keep no log
}
finished() {
    [[ $NODE_RANK != 0 && -e $runs/$1.done ]] ||
        grep -q '^final_int8_zlib_roundtrip_exact' "$runs/logs/$1.txt" 2>/dev/null
}

stage "6 smoke test: every phase and every collective, on all ranks"
if ! finished smoke; then
    on_all_ranks collectives "$root/records/smoke.py" collectives "$runs/collectives.json" ||
        die "the collectives of a step failed"
    chunk=$(sed -n 's/^TTT_CHUNK_TOKENS=//p' <<< "$settings")
    launch smoke ITERATIONS=20 WARMDOWN_ITERS=10 MIN_LR=0 RECUR_START_STEP=0.3 VAL_LOSS_EVERY=0 \
        WARMUP_STEPS=16 VAL_TOKENS_LIMIT=$((2 * chunk + 2)) || die "the smoke test failed; its \
log is $runs/logs/smoke.txt"
fi
if [[ $NODE_RANK == 0 ]] &&
        ! "$PYTHON" records/smoke.py report "$runs/logs/smoke.jsonl" "$runs/collectives.json"; then
    if [[ $TRACK == track_10min_16mb ]]; then
        mv "$runs/logs/smoke.txt" "$runs/logs/smoke.txt.no_go"  # the next try measures again
        die "no seed is run for a record on this machine; take another one (nvidia-smi topo -m \
shows how GPUs are joined), or run all the same with TRACK=track_non_record_16mb. On the other machines \
of several, remove $runs/smoke.done before the next try"
    fi
    echo "note: this is no run for the record track: it goes on"
fi

for seed in $SEEDS; do
    stage "7 seed $seed"
    finished "seed$seed" && continue
    launch "seed$seed" SEED="$seed" || die "seed $seed failed; its log is \
$runs/logs/seed$seed.txt. Run again: finished seeds are kept"
done

stage "8 record folder"
[[ $NODE_RANK == 0 ]] || { echo "made on the machine with NODE_RANK=0"; complete=1; exit 0; }
wanted="$SEEDS, $RECORD_NAME, $AUTHOR, $GITHUB_ID, $TRACK, ${AGAINST:-}, ${RECORDS:-records}"
wanted+=${ABOUT:+, about $(cksum < "$ABOUT")}
{ read -r folder && read -r made; } 2>/dev/null < "$runs/record" || folder='' made=''
if [[ ! -d $folder || $made != "$wanted" ]]; then
    logs=$(for seed in $SEEDS; do echo "$runs/logs/seed$seed.txt"; done)
    # shellcheck disable=SC2086
    "$PYTHON" records/make_record.py make --name "$RECORD_NAME" --author "$AUTHOR" \
        --github-id "$GITHUB_ID" --track "$TRACK" --code "$runs/train_gpt.py" \
        --records "${RECORDS:-records}" ${AGAINST:+--against "$AGAINST"} ${ABOUT:+--about "$ABOUT"} \
        $logs | tee "$runs/made" ||
        die "no folder was made of seeds $SEEDS; their runs are kept in $runs. A folder that is in \
the way is removed by hand, or RECORD_NAME gives another name"
    folder=$(cd "$(sed -n 's/^made //p' "$runs/made")" && pwd)
    printf '%s\n' "$folder" "$wanted" > "$runs/record"
fi
"$PYTHON" records/make_record.py verify --strict "$folder"
complete=1
