//! Sealing and opening, which every byte of a tunnel pays; handshakes, which every tunnel pays; and
//! the trust log, which every start of an agent pays.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;

use common::{
    Agent, NOW, TestRng, World, bytes,
    log::{Log, revoke},
};
use connect_crypto::{
    handshake::{initiate, receive},
    transport::Transport,
};
use connect_spec::{ids::AgentId, log::LogEntry};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// One handshake, both sides, with the judgement of the peers.
fn handshake(world: &World, initiator: &Agent, responder: &Agent) -> (Transport, Transport) {
    let peer = |agent: &Agent| {
        world.trust.verify_peer(agent.id(), agent.presented.clone(), NOW).expect("a member")
    };
    let rng = &mut TestRng::new("speed");
    let prologue = world.prologue(initiator, responder);
    let to = responder.static_keypair.public();
    let (state, message1) =
        initiate(&world.local(initiator), &prologue, &to, rng).expect("sound keys");
    let (theirs, message2) = receive(&responder.static_keypair, &prologue, &message1)
        .and_then(|received| received.answer(&peer(initiator), &world.local(responder), rng))
        .expect("sound message");
    let ours = state.read(&message2).and_then(|reply| reply.confirm(&peer(responder)));
    (ours.expect("sound reply"), theirs)
}

fn handshakes(criterion: &mut Criterion) {
    let world = World::new();
    let (initiator, responder) = (world.member("initiator"), world.member("responder"));
    criterion.bench_function("handshake, both sides", |bencher| {
        bencher.iter(|| handshake(&world, &initiator, &responder));
    });
}

fn records(criterion: &mut Criterion) {
    let world = World::new();
    let (ours, theirs) = handshake(&world, &world.member("initiator"), &world.member("responder"));
    let (mut sealer, mut opener) = (ours.split().0, theirs.split().1);
    let mut group = criterion.benchmark_group("record");
    for size in [64, 1024, 16 * 1024, 32 * 1024] {
        group.throughput(Throughput::Bytes(size as u64));
        // Each record opens once, in the order in which they were sealed. A new opener needs a new
        // sealer, so opening comes first: nothing that is sealed here is left unopened.
        group.bench_function(BenchmarkId::new("open", size), |bencher| {
            bencher.iter_batched_ref(
                || {
                    let mut record = vec![7; size];
                    sealer.seal(&mut record, 0).expect("counter left");
                    record
                },
                |record| opener.open(black_box(record)).expect("in order").len(),
                // Few at once, as in a tunnel: what is opened has just been read.
                BatchSize::NumIterations(4),
            );
        });
    }
    for size in [64, 1024, 16 * 1024, 32 * 1024] {
        group.throughput(Throughput::Bytes(size as u64));
        let mut record = vec![7; size];
        group.bench_function(BenchmarkId::new("seal", size), |bencher| {
            bencher.iter(|| {
                record.truncate(size);
                sealer.seal(black_box(&mut record), 0).expect("counter left");
            });
        });
    }
}

/// A log of revocations: verified as it comes from a peer, and read back from the own disk.
fn trust_log(criterion: &mut Criterion) {
    const ENTRIES: u32 = 100;
    let world = World::new();
    let mut log = Log::new(&world);
    for number in 0..ENTRIES {
        log.push(&world.signer, vec![revoke(AgentId(bytes(&number.to_string())))]);
        log.states.remove(0);
    }
    let wires: Vec<_> = log.entries.iter().map(LogEntry::encode).collect();
    let entry = |wire| LogEntry::decode(wire).expect("just written");
    let mut group = criterion.benchmark_group("trust log");
    group.sample_size(10);
    group.throughput(Throughput::Elements(ENTRIES.into()));
    group.bench_function("verify", |bencher| {
        bencher.iter(|| {
            let mut state = world.trust.clone();
            for wire in &wires {
                state.apply(&entry(wire)).expect("it was applied before");
            }
            state
        });
    });
    group.bench_function("read back", |bencher| {
        bencher.iter(|| {
            let mut state = world.trust.clone();
            for wire in &wires {
                state.apply_stored(&entry(wire)).expect("it was applied before");
            }
            state
        });
    });
}

criterion_group!(speed, records, handshakes, trust_log);
criterion_main!(speed);
