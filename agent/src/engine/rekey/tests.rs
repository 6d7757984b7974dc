//! Two machines over two ordered wires, on a fake clock. A sealed record is the name of its key, its
//! place under that key and its plaintext, so opening it with anything else is seen.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use connect_spec::record::StreamId;
use proptest::prelude::*;

use super::*;

/// The keys of a toy handshake: a number that depends on all that was said in it.
struct ToyKeys(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Toy {
    key: u64,
    records: u64,
}

impl Keys for ToyKeys {
    type Sealer = Toy;
    type Opener = Toy;

    fn handshake_hash(&self) -> [u8; 32] {
        toy_hash(self.0)
    }

    fn split(self) -> (Toy, Toy) {
        (Toy { key: self.0, records: 0 }, Toy { key: self.0, records: 0 })
    }
}

fn toy_hash(key: u64) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&key.to_be_bytes());
    hash
}

/// What a toy message holds: the prologue and something fresh.
fn toy_message(place: Place, fresh: u32) -> Vec<u8> {
    [&place.rekey.to_be_bytes()[..], &place.previous_hash, &fresh.to_be_bytes()].concat()
}

fn fresh_of(place: Place, message: &[u8]) -> Result<u32, Failed> {
    let failed = || Failed { code: CloseCode::Protocol, why: "does not open".to_owned() };
    let (said, fresh) = message.split_last_chunk::<4>().ok_or_else(failed)?;
    let expected = toy_message(place, 0);
    if said != &expected[..36] { Err(failed()) } else { Ok(u32::from_be_bytes(*fresh)) }
}

/// What the handshakes of a pair have in common.
#[derive(Default)]
struct World {
    fresh: AtomicU32,
    confirmed: AtomicU32,
    /// The peer is not trusted any more.
    revoked: Mutex<bool>,
}

impl World {
    fn judge(&self) -> Result<(), Failed> {
        let revoked = *self.revoked.lock().unwrap();
        let failed = Failed { code: CloseCode::Forbidden, why: "revoked".to_owned() };
        if revoked { Err(failed) } else { Ok(()) }
    }

    fn reacher(self: &Arc<Self>) -> Role<ToyKeys> {
        let world = self.clone();
        Role::Reacher(Box::new(move |place| {
            let ours = world.fresh.fetch_add(1, Ordering::Relaxed);
            let world = world.clone();
            let finish: Finish<ToyKeys> = Box::new(move |message2| {
                let theirs = fresh_of(place, message2)?;
                world.judge()?;
                Ok(ToyKeys(u64::from(ours) << 32 | u64::from(theirs)))
            });
            Ok((finish, toy_message(place, ours)))
        }))
    }

    fn exposer(self: &Arc<Self>) -> Role<ToyKeys> {
        let world = self.clone();
        Role::Exposer(Box::new(move |place, message1| {
            let ours = fresh_of(place, message1)?;
            world.judge()?;
            let theirs = world.fresh.fetch_add(1, Ordering::Relaxed);
            let confirming = world.clone();
            Ok(Answered {
                keys: ToyKeys(u64::from(ours) << 32 | u64::from(theirs)),
                message2: toy_message(place, theirs),
                confirmed: Box::new(move || {
                    confirming.confirmed.fetch_add(1, Ordering::Relaxed);
                }),
            })
        }))
    }
}

/// One end: the machine, what it seals and opens with, and records of the channel that wait.
struct End {
    rekey: Rekey<ToyKeys>,
    sealer: Toy,
    opener: Toy,
    data: VecDeque<Vec<u8>>,
    received: Vec<Vec<u8>>,
    /// Rekey records that it opened, by type.
    seen: Vec<u8>,
    /// Keys that it sealed with, in order.
    sealed_with: Vec<u64>,
    ended: Option<RekeyEnd>,
    violation: Option<ProtocolViolation>,
}

impl End {
    fn new(role: Role<ToyKeys>, after: RekeyAfter, now: Instant) -> Self {
        let first = Toy { key: u64::MAX, records: 0 };
        Self {
            rekey: Rekey::new(role, after, 0, now, toy_hash(first.key)),
            sealer: first,
            opener: first,
            data: VecDeque::new(),
            received: Vec::new(),
            seen: Vec::new(),
            sealed_with: vec![first.key],
            ended: None,
            violation: None,
        }
    }

    /// Seals the next record, as the driver does.
    fn transmit(&mut self, now: Instant) -> Option<(Toy, Vec<u8>)> {
        if self.ended.is_some() {
            return None;
        }
        let mut record = Vec::new();
        let wanted = self.rekey.wants_transmit(now);
        match self.rekey.poll_transmit(now, true, &mut record) {
            Ok(true) => assert!(wanted, "the driver would not have been told"),
            Ok(false) => {
                assert!(!wanted, "the driver would turn in circles");
                record = self.data.pop_front()?;
            }
            Err(ended) => {
                self.ended = Some(ended);
                return None;
            }
        }
        assert!(now < self.rekey.made + MAX_KEY_AGE, "sealed under a key that is too old");
        let sealed = (self.sealer, record);
        self.sealer.records += 1;
        if let Some(next) = self.rekey.sealed(sealed.1.len()) {
            assert!(!self.sealed_with.contains(&next.key), "back to an old key");
            self.sealed_with.push(next.key);
            self.sealer = next;
        }
        Some(sealed)
    }

    /// Opens a record, as the driver does.
    #[track_caller]
    fn receive(&mut self, now: Instant, (sealed, record): (Toy, Vec<u8>)) {
        assert_eq!(sealed, self.opener, "a record that does not open: {record:02x?}");
        self.opener.records += 1;
        if is_rekey(&record) {
            self.seen.push(record[0]);
        }
        match self.rekey.opened(now, true, &record) {
            Ok(Opened::ForChannel) => self.received.push(record),
            Ok(Opened::Taken) => {}
            Ok(Opened::Switched(next)) => self.opener = next,
            Err(violation) => self.violation = Some(violation),
        }
    }
}

struct Pair {
    world: Arc<World>,
    now: Instant,
    reacher: End,
    exposer: End,
    to_exposer: VecDeque<(Toy, Vec<u8>)>,
    to_reacher: VecDeque<(Toy, Vec<u8>)>,
    said: [u64; 2],
}

/// What can happen next in a pair.
#[derive(Debug, Clone, Copy)]
enum Step {
    ReacherSends,
    ExposerSends,
    ReacherReceives,
    ExposerReceives,
    ReacherData,
    ExposerData,
    Time(u16),
}

impl Pair {
    fn new(after: RekeyAfter) -> Self {
        let (world, now) = (Arc::new(World::default()), Instant::now());
        Self {
            reacher: End::new(world.reacher(), after, now),
            exposer: End::new(world.exposer(), after, now),
            world,
            now,
            to_exposer: VecDeque::new(),
            to_reacher: VecDeque::new(),
            said: [0; 2],
        }
    }

    #[track_caller]
    fn step(&mut self, step: Step) {
        let mut data = |side: usize| {
            self.said[side] += 1;
            let bytes = &self.said[side].to_be_bytes();
            let mut record = Vec::new();
            Record::Data { stream: StreamId::FIRST, offset: 0, bytes }.encode(&mut record);
            record
        };
        match step {
            Step::ReacherSends => self.to_exposer.extend(self.reacher.transmit(self.now)),
            Step::ExposerSends => self.to_reacher.extend(self.exposer.transmit(self.now)),
            Step::ReacherReceives => {
                if let Some(sealed) = self.to_reacher.pop_front() {
                    self.reacher.receive(self.now, sealed);
                }
            }
            Step::ExposerReceives => {
                if let Some(sealed) = self.to_exposer.pop_front() {
                    self.exposer.receive(self.now, sealed);
                }
            }
            Step::ReacherData => self.reacher.data.push_back(data(0)),
            Step::ExposerData => self.exposer.data.push_back(data(1)),
            Step::Time(millis) => self.now += Duration::from_millis(millis.into()),
        }
        self.invariants();
    }

    #[track_caller]
    fn invariants(&self) {
        assert_eq!((self.reacher.violation, self.exposer.violation), (None, None));
        for end in [&self.reacher, &self.exposer] {
            // What the next prologue names is the handshake before it, and none that is older.
            let number = usize::try_from(end.rekey.number).unwrap();
            assert_eq!(end.rekey.hash, toy_hash(end.sealed_with[number]));
        }
        let (ours, theirs) = (self.reacher.rekey.number, self.exposer.rekey.number);
        // The exposer is the first to be through.
        assert!(theirs == ours || theirs == ours + 1, "{ours} and {theirs}");
        // The directions of a side are at most one key apart, and so are the sides.
        let place = |end: &End, key| end.sealed_with.iter().position(|used| *used == key);
        for (from, to) in [(&self.reacher, &self.exposer), (&self.exposer, &self.reacher)] {
            let opens = place(from, to.opener.key).expect("a key that the sender sealed with");
            let seals = from.sealed_with.len() - 1;
            assert!(seals == opens || seals == opens + 1, "{seals} and {opens}");
        }
        let sides = (self.reacher.sealed_with.len(), self.exposer.sealed_with.len());
        assert!(sides.0 == sides.1 || sides.0 == sides.1 + 1, "{sides:?}");
        let common = sides.0.min(sides.1);
        assert_eq!(self.reacher.sealed_with[..common], self.exposer.sealed_with[..common]);
    }

    /// Lets everything that is said arrive, until there is nothing left.
    #[track_caller]
    fn settle(&mut self) {
        loop {
            let before = (self.to_exposer.len(), self.to_reacher.len());
            self.step(Step::ReacherSends);
            self.step(Step::ExposerSends);
            let said = (self.to_exposer.len(), self.to_reacher.len());
            self.step(Step::ReacherReceives);
            self.step(Step::ExposerReceives);
            if before == (0, 0) && said == (0, 0) {
                return;
            }
        }
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    fn numbers(&self) -> (u32, u32) {
        (self.reacher.rekey.number, self.exposer.rekey.number)
    }
}

fn after(text: &str) -> RekeyAfter {
    text.parse().unwrap()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn limits_can_be_lowered_and_not_raised() {
    let default = RekeyAfter::default();
    assert_eq!(after("seconds=1"), RekeyAfter { time: SECOND, ..default });
    assert_eq!(
        after("records=5,bytes=7,seconds=3"),
        RekeyAfter { time: 3 * SECOND, records: 5, bytes: 7 }
    );
    assert_eq!(after("seconds=121,records=16777217,bytes=68719476737"), default);
    for wrong in ["", "seconds", "seconds=", "seconds=x", "seconds=-1", "hours=1", "records=1;"] {
        assert!(wrong.parse::<RekeyAfter>().is_err(), "{wrong}");
    }
}

#[test]
fn keys_are_replaced_when_their_time_is_over_also_without_data() {
    let mut pair = Pair::new(RekeyAfter::default());
    pair.settle();
    pair.wait(REKEY_AFTER - Duration::from_millis(1));
    pair.settle();
    assert_eq!(pair.numbers(), (0, 0));
    for number in 1..10 {
        pair.wait(if number == 1 { Duration::from_millis(1) } else { REKEY_AFTER });
        pair.settle();
        assert_eq!(pair.numbers(), (number, number));
        assert_eq!(pair.world.confirmed.load(Ordering::Relaxed), number);
        assert_eq!(pair.reacher.sealer.key, pair.exposer.opener.key);
    }
    // The exposer's time is over at the same moment: it asks, and the reacher has begun already.
    assert_eq!(pair.exposer.seen, [0x31, 0x33].repeat(9));
    assert_eq!(pair.reacher.seen, [0x30, 0x32, 0x33].repeat(9));
}

#[test]
fn a_reacher_is_early_by_a_tenth_at_most() {
    let now = Instant::now();
    for (random, early) in [(0, Duration::ZERO), (u32::MAX, REKEY_AFTER / 10)] {
        let role = Arc::new(World::default()).reacher();
        let rekey = Rekey::new(role, RekeyAfter::default(), random, now, [0; 32]);
        assert_eq!(rekey.poll_timeout(true), now + REKEY_AFTER - early);
    }
}

#[test]
fn keys_are_replaced_after_so_many_records_or_bytes_in_either_direction() {
    let check = |limit: &str, step: Step, before: u32| {
        let mut pair = Pair::new(after(limit));
        for _ in 0..before {
            pair.step(step);
        }
        pair.settle();
        assert_eq!(pair.numbers(), (0, 0), "{limit}");
        pair.step(step);
        pair.settle();
        assert_eq!(pair.numbers(), (1, 1), "{limit}");
    };
    for step in [Step::ReacherData, Step::ExposerData] {
        check("records=10", step, 9);
        // A DATA record of 8 bytes has 32.
        check("bytes=321", step, 10);
    }
}

#[test]
fn nothing_is_begun_before_the_greeting_is_over() {
    let mut pair = Pair::new(after("seconds=1"));
    pair.wait(5 * SECOND);
    let mut record = Vec::new();
    for end in [&mut pair.reacher, &mut pair.exposer] {
        assert_eq!(end.rekey.poll_transmit(pair.now, false, &mut record), Ok(false));
        assert!(end.rekey.poll_timeout(false) > pair.now);
        // A peer that does not wait is for the channel, which refuses it.
        Record::HsWant(1).encode(&mut record);
        let opened = end.rekey.opened(pair.now, false, &record);
        assert!(matches!(opened, Ok(Opened::ForChannel)));
    }
    pair.settle();
    assert_eq!(pair.numbers(), (1, 1));
}

#[test]
fn data_goes_on_in_both_directions_while_keys_are_replaced() {
    use Step::{
        ExposerData, ExposerReceives, ExposerSends, ReacherData, ReacherReceives, ReacherSends,
    };
    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER);
    pair.step(ReacherSends);
    // HS1 is on its way, and more behind it, and against it.
    for _ in 0..5 {
        for step in [ReacherData, ReacherSends, ExposerData, ExposerSends] {
            pair.step(step);
        }
    }
    for _ in 0..6 {
        pair.step(ExposerReceives);
        pair.step(ReacherReceives);
    }
    assert_eq!((pair.reacher.received.len(), pair.exposer.received.len()), (4, 5));
    assert_eq!(pair.numbers(), (0, 0));
    pair.settle();
    assert_eq!(pair.numbers(), (1, 1));
    assert_eq!((pair.reacher.received.len(), pair.exposer.received.len()), (5, 6));
}

/// Every order in which the first eight things can happen around one rekey, in the middle of data.
#[test]
fn every_interleaving_of_a_rekey_with_data_ends_well() {
    const STEPS: [Step; 4] =
        [Step::ReacherSends, Step::ExposerSends, Step::ReacherReceives, Step::ExposerReceives];
    const DEPTH: u32 = 8;
    for order in 0..4_usize.pow(DEPTH) {
        let mut pair = Pair::new(after("records=4"));
        for _ in 0..5 {
            pair.step(Step::ReacherData);
            pair.step(Step::ExposerData);
            pair.step(Step::ReacherSends);
            pair.step(Step::ExposerSends);
        }
        let mut rest = order;
        for _ in 0..DEPTH {
            pair.step(STEPS[rest % 4]);
            rest /= 4;
        }
        for _ in 0..20 {
            STEPS.into_iter().for_each(|step| pair.step(step));
        }
        assert!(pair.numbers().0 > 0, "order {order}");
    }
}

#[test]
fn an_unanswered_reacher_tries_again_and_gives_up_in_the_end() {
    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER);
    let mut messages = Vec::new();
    while pair.reacher.ended.is_none() {
        while let Some((_, record)) = pair.reacher.transmit(pair.now) {
            messages.push((pair.now, record));
        }
        let timeout = pair.reacher.rekey.poll_timeout(true);
        assert!(pair.reacher.ended.is_some() || timeout > pair.now, "a circle");
        pair.now = timeout;
    }
    assert_eq!(pair.reacher.ended, Some(RekeyEnd::TooOld));
    assert_eq!(messages.len(), usize::from(MAX_REKEY_ATTEMPTS));
    for (attempt, pair) in messages.windows(2).enumerate() {
        assert_eq!(pair[1].0 - pair[0].0, REKEY_RETRY);
        assert_eq!(pair[0].1[..6], [0x31, 0, 0, 0, 1, u8::try_from(attempt).unwrap()]);
        assert_ne!(pair[0].1[6..], pair[1].1[6..], "each has a fresh key");
    }
}

#[test]
fn an_exposer_that_nobody_answers_gives_up_in_the_end() {
    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER);
    pair.step(Step::ExposerSends);
    assert_eq!(pair.to_reacher.pop_front().unwrap().1, [0x30, 0, 0, 0, 1]);
    pair.step(Step::ExposerSends);
    assert!(pair.to_reacher.is_empty(), "it asks once");
    pair.now = pair.exposer.rekey.poll_timeout(true);
    assert!(pair.exposer.rekey.wants_transmit(pair.now));
    pair.exposer.data.push_back(vec![0x20]);
    pair.step(Step::ExposerSends);
    assert_eq!(pair.exposer.ended, Some(RekeyEnd::TooOld));
    assert!(pair.to_reacher.is_empty(), "nothing goes out under a key that is too old");
}

#[test]
fn answers_that_are_late_count_and_others_are_left() {
    use Step::{ExposerReceives, ExposerSends, ReacherReceives, ReacherSends, Time};
    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER);
    for _ in 0..3 {
        pair.step(ReacherSends);
        pair.step(Time(10_000));
    }
    pair.step(ExposerReceives);
    pair.step(ExposerReceives);
    pair.step(ExposerSends);
    pair.step(ExposerSends);
    // The first answer is good; the second comes after SWITCH, and the third HS1 before it.
    pair.step(ReacherReceives);
    pair.step(ReacherSends);
    pair.settle();
    assert_eq!(pair.numbers(), (1, 1));
    assert_eq!(pair.exposer.seen, [0x31, 0x31, 0x31, 0x33]);
    pair.wait(REKEY_AFTER);
    pair.settle();
    assert_eq!(pair.numbers(), (2, 2));
}

#[test]
fn a_tunnel_of_a_revoked_peer_gets_no_new_keys() {
    // Whoever is the first to know.
    for late in [false, true] {
        let mut pair = Pair::new(RekeyAfter::default());
        pair.wait(REKEY_AFTER);
        pair.step(Step::ReacherSends);
        if late {
            pair.step(Step::ExposerReceives);
            pair.step(Step::ExposerSends);
        }
        *pair.world.revoked.lock().unwrap() = true;
        pair.settle();
        let (knows, hears) =
            if late { (&pair.reacher, &pair.exposer) } else { (&pair.exposer, &pair.reacher) };
        assert_eq!(knows.ended, Some(RekeyEnd::Failed("revoked".to_owned())));
        assert_eq!(hears.received, [[0x3e, 0, 3]], "the peer is told, and that is all");
        assert_eq!(pair.numbers(), (0, 0));
    }
}

#[test]
fn a_message_that_does_not_open_ends_the_tunnel() {
    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER);
    pair.step(Step::ReacherSends);
    pair.to_exposer[0].1[20] ^= 1;
    pair.settle();
    assert_eq!(pair.exposer.ended, Some(RekeyEnd::Failed("does not open".to_owned())));
    assert_eq!(pair.reacher.received, [[0x3e, 0, 1]]);

    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER);
    pair.step(Step::ReacherSends);
    pair.step(Step::ExposerReceives);
    pair.step(Step::ExposerSends);
    pair.to_reacher[0].1[20] ^= 1;
    pair.settle();
    assert_eq!(pair.reacher.ended, Some(RekeyEnd::Failed("does not open".to_owned())));
    assert_eq!(pair.exposer.received, [[0x3e, 0, 1]]);
}

/// Runs a pair up to some point of a rekey, then shows one side a record.
#[track_caller]
fn violates(prepare: &[Step], at_reacher: bool, record: &Record<'_>) {
    let mut pair = Pair::new(RekeyAfter::default());
    pair.wait(REKEY_AFTER - SECOND);
    prepare.iter().for_each(|step| pair.step(*step));
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    let end = if at_reacher { &mut pair.reacher } else { &mut pair.exposer };
    let opened = end.rekey.opened(pair.now, true, &bytes);
    assert!(opened.is_err(), "{record:?} after {prepare:?}");
}

#[test]
fn records_out_of_order_are_violations() {
    use Step::{ExposerReceives, ExposerSends, ReacherReceives, ReacherSends, Time};
    let place = Place { rekey: 1, previous_hash: toy_hash(u64::MAX) };
    let message = &toy_message(place, 77);
    let rekey = |number, attempt| RekeyTry { number, attempt };
    let hs1 = |number, attempt| Record::Hs1 { rekey: rekey(number, attempt), message };
    let hs2 = |number, attempt| Record::Hs2 { rekey: rekey(number, attempt), message };
    let switch = |number, attempt| Record::Switch(rekey(number, attempt));
    let (reacher, exposer) = (true, false);

    let settled: &[Step] = &[];
    violates(settled, reacher, &hs1(1, 0));
    violates(settled, reacher, &hs2(1, 0));
    violates(settled, exposer, &hs2(1, 0));
    violates(settled, reacher, &switch(1, 0));
    violates(settled, exposer, &switch(1, 0));
    violates(settled, exposer, &Record::HsWant(1));
    violates(settled, reacher, &Record::HsWant(2));
    violates(settled, exposer, &hs1(2, 0));
    violates(settled, exposer, &hs1(1, 1));

    // The reacher asked to begin; asked twice.
    let asked: &[Step] = &[Time(1000), ExposerSends, ReacherReceives];
    violates(asked, reacher, &Record::HsWant(1));

    let begun: &[Step] = &[Time(1000), ReacherSends];
    violates(begun, reacher, &hs1(1, 0));
    violates(begun, reacher, &hs2(2, 0));
    violates(begun, reacher, &hs2(1, 1));
    violates(begun, reacher, &switch(1, 0));
    violates(begun, reacher, &Record::HsWant(2));

    let came: &[Step] = &[Time(1000), ReacherSends, ExposerReceives];
    violates(came, exposer, &hs1(1, 0));
    violates(came, exposer, &hs1(1, 2));
    violates(came, exposer, &hs1(2, 0));
    // What the answer is cannot be known yet.
    violates(came, exposer, &switch(1, 0));

    let answered = &[came, &[ExposerSends]].concat();
    violates(answered, exposer, &switch(2, 0));
    violates(answered, exposer, &switch(1, 1));
    violates(answered, exposer, &hs2(1, 0));

    let agreed = &[answered, &[ReacherReceives][..]].concat();
    violates(agreed, reacher, &hs2(1, 0));
    violates(agreed, reacher, &hs2(1, 1));
    violates(agreed, reacher, &switch(1, 0));
    violates(agreed, reacher, &Record::HsWant(1));

    let sent = &[agreed, &[ReacherSends][..]].concat();
    violates(sent, reacher, &switch(2, 0));
    violates(sent, reacher, &switch(1, 1));
    violates(sent, reacher, &hs2(1, 0));
    violates(sent, reacher, &Record::HsWant(2));

    let switched = &[sent, &[ExposerReceives][..]].concat();
    violates(switched, exposer, &switch(1, 0));
    violates(switched, exposer, &switch(2, 0));
    violates(switched, exposer, &hs1(1, 1));
    violates(switched, exposer, &hs1(2, 0));

    let through =
        &[sent, &[ReacherSends, ExposerReceives, ExposerReceives, ExposerSends][..]].concat();
    violates(through, exposer, &switch(1, 0));
    violates(through, exposer, &switch(2, 0));
    violates(through, exposer, &hs1(1, 0));
    let done = &[through, &[ReacherReceives][..]].concat();
    violates(done, reacher, &switch(1, 0));
    violates(done, reacher, &hs2(1, 0));
    violates(done, reacher, &Record::HsWant(1));
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::ReacherSends),
        4 => Just(Step::ExposerSends),
        4 => Just(Step::ReacherReceives),
        4 => Just(Step::ExposerReceives),
        2 => Just(Step::ReacherData),
        2 => Just(Step::ExposerData),
        1 => (0u16..12_000).prop_map(Step::Time),
    ]
}

proptest! {
    /// Whatever happens in whatever order: nobody seals under a key that the other has not got, no data
    /// is lost or out of order, and a pair that is left alone settles.
    #[test]
    fn any_order_of_events_keeps_the_keys_in_step(
        steps in proptest::collection::vec(step(), 0..400),
        records in 6u64..12,
        seconds in 1u64..120,
    ) {
        let mut pair = Pair::new(after(&format!("records={records},seconds={seconds}")));
        for one in steps {
            pair.step(one);
        }
        // Both may have given up: time went on without them.
        if pair.reacher.ended.is_none() && pair.exposer.ended.is_none() {
            pair.settle();
            prop_assert!(pair.now >= pair.reacher.rekey.made);
            let arrived = (pair.exposer.received.len(), pair.reacher.received.len());
            let pings = usize::try_from(pair.numbers().0).unwrap();
            let said = pair.said.map(|said| usize::try_from(said).unwrap());
            if pair.reacher.ended.is_none() && pair.exposer.ended.is_none() {
                prop_assert_eq!(arrived, (said[0] + pings, said[1]));
                prop_assert_eq!(pair.numbers().0, pair.numbers().1);
            }
        }
        let ordered = |received: &[Vec<u8>]| {
            let data: Vec<_> = received.iter().filter(|record| record[0] == 0x12).cloned().collect();
            data.is_sorted()
        };
        prop_assert!(ordered(&pair.exposer.received) && ordered(&pair.reacher.received));
    }

    #[test]
    fn no_record_makes_a_machine_panic(
        records in proptest::collection::vec(
            (0x30u8..0x34, 0u32..3, 0u8..7, proptest::collection::vec(any::<u8>(), 0..50)), 0..20
        ),
    ) {
        let mut pair = Pair::new(RekeyAfter::default());
        pair.wait(REKEY_AFTER);
        let mut out = Vec::new();
        for (kind, number, attempt, rest) in records {
            let record = [&[kind][..], &number.to_be_bytes(), &[attempt], &rest].concat();
            for end in [&mut pair.reacher, &mut pair.exposer] {
                let _ = end.rekey.opened(pair.now, true, &record);
                if end.rekey.poll_transmit(pair.now, true, &mut out) == Ok(true) {
                    let _ = end.rekey.sealed(out.len());
                }
            }
        }
    }
}
