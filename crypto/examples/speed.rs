//! Measures handshakes, sealing and opening, and the trust log: `cargo run --release -p connect-crypto --example speed`.

#![expect(clippy::print_stdout, reason = "a measurement shows what it found")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{
    Agent, NOW, TestRng, World, bytes,
    log::{Log, revoke},
};
use connect_crypto::{
    handshake::{initiate, receive},
    transport::Transport,
};
use connect_spec::{ids::AgentId, log::LogEntry};

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

/// A log of `count` revocations: verified as it comes from a peer, and read back from the own disk.
fn trust_log(world: &World, count: u32) {
    let mut log = Log::new(world);
    for number in 0..count {
        log.push(&world.signer, vec![revoke(AgentId(bytes(&number.to_string())))]);
        log.states.remove(0);
    }
    let wires: Vec<_> = log.entries.iter().map(LogEntry::encode).collect();
    let begun = Instant::now();
    let mut verified = world.trust.clone();
    for wire in &wires {
        let entry = LogEntry::decode(wire).expect("just written");
        verified.apply(&entry).expect("it was applied before");
    }
    println!("{count} entries of the log, verified: {:?}", begun.elapsed());
    let begun = Instant::now();
    let mut stored = world.trust.clone();
    for wire in &wires {
        let entry = LogEntry::decode(wire).expect("just written");
        stored.apply_stored(&entry).expect("it was applied before");
    }
    println!("{count} entries of the log, read back: {:?}", begun.elapsed());
    assert_eq!(verified, stored);
}

fn main() {
    let world = World::new();
    trust_log(&world, 1000);
    let (initiator, responder) = (world.member("initiator"), world.member("responder"));

    let begun = Instant::now();
    let rounds = 500;
    for _ in 0..rounds {
        std::hint::black_box(handshake(&world, &initiator, &responder));
    }
    println!("handshake, both sides: {:?}", begun.elapsed() / rounds);

    let (ours, theirs) = handshake(&world, &initiator, &responder);
    let (mut sealer, mut opener) = (ours.split().0, theirs.split().1);
    for length in [64, 1024, 16 * 1024, 32 * 1024, 65_519] {
        let mut record = vec![7; length];
        // The best of many: whatever else runs on the machine only makes a record slower.
        let (mut sealing, mut opening) = (Duration::MAX, Duration::MAX);
        for _ in 0..20_000 {
            let begun = Instant::now();
            sealer.seal(&mut record, 0).expect("counter left");
            sealing = sealing.min(begun.elapsed());
            let begun = Instant::now();
            opener.open(&mut record).expect("in order");
            opening = opening.min(begun.elapsed());
            record.truncate(length);
        }
        let bytes = f64::from(u32::try_from(length).expect("small"));
        let rate = |time: Duration| bytes / time.as_secs_f64() / 1e6;
        println!("{length:>6} B: seal {:.0} MB/s, open {:.0} MB/s", rate(sealing), rate(opening));
    }
}
