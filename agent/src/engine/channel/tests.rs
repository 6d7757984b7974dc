use connect_spec::limits::{INITIAL_STREAM_WINDOW, MAX_STREAM_WINDOW};
use proptest::prelude::*;

use super::*;

#[path = "tests/vectors.rs"]
mod vectors;

/// What a read found, for tests that bring a buffer.
#[derive(Debug, PartialEq, Eq)]
enum Got {
    Bytes(usize),
    Finished,
    Blocked,
}

impl Channel {
    fn read_into(&mut self, id: StreamId, out: &mut [u8]) -> Result<Got, StreamError> {
        Ok(match self.read(id, out.len())? {
            Read::Bytes(bytes) => {
                out[..bytes.len()].copy_from_slice(&bytes);
                Got::Bytes(bytes.len())
            }
            Read::Finished => Got::Finished,
            Read::Blocked => Got::Blocked,
        })
    }

    fn handle(&mut self, now: Instant, record: &[u8]) {
        self.handle_record(now, &Bytes::copy_from_slice(record));
    }

    fn waiting(&self, id: StreamId) -> usize {
        self.streams.get(&id).map_or(0, |stream| stream.recv.waiting())
    }
}

/// Two channels joined by a transport that keeps the order, on a clock that the test holds.
struct Pair {
    reacher: Channel,
    exposer: Channel,
    now: Instant,
    events: Vec<(Side, Event)>,
}

impl Pair {
    fn greeted() -> Self {
        let mut pair = Self::new();
        pair.drive();
        for side in [Side::Reacher, Side::Exposer] {
            assert!(pair.events.contains(&(side, Event::Established)));
        }
        pair
    }

    fn new() -> Self {
        let now = Instant::now();
        let mut pair = Self {
            reacher: Channel::new(Side::Reacher, now, Duration::ZERO),
            exposer: Channel::new(Side::Exposer, now, Duration::ZERO),
            now,
            events: Vec::new(),
        };
        pair.attach();
        pair
    }

    fn attach(&mut self) {
        let now = self.now;
        self.reacher.attach(now);
        self.exposer.attach(now);
    }

    /// Loses the tunnel and whatever is in it, and brings a new one.
    fn cut(&mut self) {
        self.reacher.detach();
        self.exposer.detach();
        self.attach();
    }

    fn channel(&mut self, side: Side) -> &mut Channel {
        match side {
            Side::Reacher => &mut self.reacher,
            Side::Exposer => &mut self.exposer,
        }
    }

    /// Hands one record from `side` to the other; `false` when there is none.
    fn step(&mut self, side: Side) -> bool {
        let now = self.now;
        let mut record = Vec::new();
        let other = match side {
            Side::Reacher => Side::Exposer,
            Side::Exposer => Side::Reacher,
        };
        let sent = self.channel(side).poll_transmit(now, &mut record);
        if sent {
            self.channel(other).handle(now, &record);
        }
        for side in [Side::Reacher, Side::Exposer] {
            while let Some(event) = self.channel(side).poll_event() {
                self.events.push((side, event));
            }
            invariant_credit_is_respected(self.channel(side));
        }
        sent
    }

    /// Exchanges records until both sides have nothing to say.
    fn drive(&mut self) {
        let mut steps = 0;
        while self.step(Side::Reacher) | self.step(Side::Exposer) {
            steps += 1;
            assert!(steps < 100_000, "the two sides never come to rest");
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        self.reacher.handle_timeout(now);
        self.exposer.handle_timeout(now);
        self.drive();
    }

    fn open(&mut self) -> StreamId {
        let stream = self.reacher.open(Purpose::Target).expect("open channel");
        self.drive();
        assert!(self.events.contains(&(Side::Exposer, Event::Incoming(stream, Purpose::Target))));
        stream
    }

    fn read_all(&mut self, side: Side, stream: StreamId) -> Vec<u8> {
        let mut all = Vec::new();
        let mut part = [0; 5000];
        loop {
            match self.channel(side).read_into(stream, &mut part) {
                Ok(Got::Bytes(length)) => all.extend_from_slice(&part[..length]),
                Ok(Got::Finished | Got::Blocked) | Err(_) => return all,
            }
            self.drive();
        }
    }

    fn assert_closed(&mut self, side: Side, expected: CloseReason) {
        assert!(
            self.events.contains(&(side, Event::Closed(expected))),
            "{side:?} is not closed by {expected:?}: {:?}",
            self.events
        );
    }
}

fn invariant_credit_is_respected(channel: &Channel) {
    assert!(channel.credit.sent <= channel.credit.peer_max);
    assert!(channel.credit.received <= channel.credit.max);
    assert!(channel.credit.consumed <= channel.credit.received);
    if channel.phase != Phase::Closed {
        let open: u64 = channel.streams.values().map(|stream| stream.recv.received()).sum();
        assert!(
            open <= channel.credit.received,
            "streams hold bytes that the channel never counted"
        );
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index % 251).expect("below 251")).collect()
}

#[test]
fn client_may_speak_before_the_target_answers() {
    let mut pair = Pair::new();
    let stream = pair.reacher.open(Purpose::Target).expect("open before the greeting");
    assert_eq!(pair.reacher.write(stream, &b"early"[..]), Ok(5));
    pair.drive();
    assert_eq!(pair.read_all(Side::Exposer, stream), b"early");
}

#[test]
fn server_may_speak_first() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    pair.exposer.opened(stream);
    assert_eq!(pair.exposer.write(stream, &b"220 ready"[..]), Ok(9));
    pair.drive();
    assert_eq!(pair.read_all(Side::Reacher, stream), b"220 ready");
}

#[test]
fn one_direction_ends_and_the_other_goes_on() {
    for (first, second) in [(Side::Reacher, Side::Exposer), (Side::Exposer, Side::Reacher)] {
        let mut pair = Pair::greeted();
        let stream = pair.open();
        pair.channel(first).write(stream, &b"request"[..]).expect("room");
        pair.channel(first).finish(stream).expect("live");
        pair.drive();
        assert_eq!(pair.read_all(second, stream), b"request");
        assert_eq!(pair.channel(second).read_into(stream, &mut [0; 8]), Ok(Got::Finished));
        pair.channel(second).write(stream, &b"late answer"[..]).expect("room");
        pair.channel(second).finish(stream).expect("live");
        pair.drive();
        assert_eq!(pair.read_all(first, stream), b"late answer");
        assert_eq!(pair.channel(first).read_into(stream, &mut [0; 8]), Ok(Got::Finished));
    }
}

#[test]
fn finished_streams_are_forgotten_by_both_sides() {
    let mut pair = Pair::greeted();
    for _ in 0..3 {
        let stream = pair.open();
        for side in [Side::Reacher, Side::Exposer] {
            pair.channel(side).write(stream, &b"x"[..]).expect("room");
            pair.channel(side).finish(stream).expect("live");
        }
        pair.drive();
        for side in [Side::Reacher, Side::Exposer] {
            assert_eq!(pair.read_all(side, stream), b"x");
            pair.channel(side).release(stream);
        }
        pair.drive();
    }
    assert!(pair.reacher.streams.is_empty() && pair.exposer.streams.is_empty());
    assert!(pair.reacher.sending.is_empty() && pair.reacher.feedback.is_empty());
}

#[test]
fn released_stream_is_reset_and_the_other_side_hears_of_it() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    pair.exposer.write(stream, &b"never read"[..]).expect("room");
    pair.reacher.release(stream);
    pair.drive();
    assert_eq!(
        pair.exposer.read_into(stream, &mut [0; 8]),
        Err(StreamError::Reset(ResetCode::Aborted))
    );
    pair.exposer.release(stream);
    assert!(pair.reacher.streams.is_empty() && pair.exposer.streams.is_empty());
}

#[test]
fn refusal_of_the_target_reaches_the_client_as_its_own_code() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    pair.reacher.write(stream, &b"hello?"[..]).expect("room");
    pair.exposer.reset(stream, ResetCode::TargetRefused);
    pair.drive();
    assert_eq!(
        pair.reacher.write(stream, &b"again"[..]),
        Err(StreamError::Reset(ResetCode::TargetRefused))
    );
}

#[test]
fn reader_that_stops_holds_the_writer_and_nobody_else() {
    let mut pair = Pair::greeted();
    let (stalled, lively) = (pair.open(), pair.open());
    let mut written = 0;
    loop {
        let taken = pair.reacher.write(stalled, &pattern(50_000)[..]).expect("live");
        written += taken as u64;
        pair.drive();
        if taken == 0 {
            break;
        }
    }
    let stalled_at_exposer = &pair.exposer.streams[&stalled].recv;
    assert_eq!(stalled_at_exposer.received(), INITIAL_STREAM_WINDOW);
    assert!(written <= INITIAL_STREAM_WINDOW + 128 * 1024);

    for _ in 0..200 {
        pair.reacher.write(lively, &pattern(20_000)[..]).expect("room");
        pair.drive();
        assert_eq!(pair.read_all(Side::Exposer, lively).len(), 20_000);
    }
    // Reading again lets the writer go on.
    pair.events.clear();
    assert_eq!(pair.read_all(Side::Exposer, stalled).len() as u64, written);
    assert!(pair.events.contains(&(Side::Reacher, Event::Writable(stalled))));
}

/// A transfer both ways with half-close, the tunnel cut after every single record in turn.
#[test]
fn transfer_survives_a_cut_at_every_record() {
    // Longer than a window, so that credit has to survive too.
    let request = pattern(700_000);
    let answer = pattern(300_001);
    let mut cut_after = 0;
    loop {
        let mut pair = Pair::new();
        let stream = pair.reacher.open(Purpose::Target).expect("open");
        let (mut sent, mut answered) = (0, 0);
        let (mut received, mut answer_received) = (Vec::new(), Vec::new());
        let (mut records, mut was_cut) = (0, false);
        let mut rounds = 0;
        while pair.reacher.streams.contains_key(&stream)
            || pair.exposer.streams.contains_key(&stream)
        {
            rounds += 1;
            assert!(rounds < 10_000, "the transfer never ends after a cut at {cut_after}");
            sent += pair.reacher.write(stream, &request[sent..]).unwrap_or(0);
            if sent == request.len() {
                let _ = pair.reacher.finish(stream);
            }
            let mut part = [0; 20_000];
            if let Ok(Got::Bytes(length)) = pair.exposer.read_into(stream, &mut part) {
                received.extend_from_slice(&part[..length]);
            }
            // The exposer answers once it has the whole request.
            if received.len() == request.len() {
                answered += pair.exposer.write(stream, &answer[answered..]).unwrap_or(0);
                if answered == answer.len() {
                    let _ = pair.exposer.finish(stream);
                }
            }
            if let Ok(Got::Bytes(length)) = pair.reacher.read_into(stream, &mut part) {
                answer_received.extend_from_slice(&part[..length]);
            }
            for side in [Side::Reacher, Side::Exposer] {
                let wrote_all = match side {
                    Side::Reacher => sent == request.len(),
                    Side::Exposer => answered == answer.len(),
                };
                let read_all = pair.channel(side).read_into(stream, &mut []) == Ok(Got::Finished);
                if wrote_all && read_all {
                    pair.channel(side).release(stream);
                }
                records += usize::from(pair.step(side));
                if records > cut_after && !was_cut {
                    was_cut = true;
                    pair.reacher.detach();
                    pair.exposer.detach();
                    // Applications go on with what they have while there is no tunnel.
                    while let Ok(Got::Bytes(length)) = pair.exposer.read_into(stream, &mut part) {
                        received.extend_from_slice(&part[..length]);
                    }
                    while let Ok(Got::Bytes(length)) = pair.reacher.read_into(stream, &mut part) {
                        answer_received.extend_from_slice(&part[..length]);
                    }
                    pair.attach();
                }
            }
            pair.now += Duration::from_millis(5);
            let now = pair.now;
            pair.reacher.handle_timeout(now);
            pair.exposer.handle_timeout(now);
        }
        assert!(received == request && answer_received == answer, "cut after {cut_after}");
        assert_eq!((pair.reacher.kept, pair.exposer.kept), (0, 0));
        if !was_cut {
            assert!(cut_after > 20, "the transfer has too few records to prove anything");
            return;
        }
        cut_after += 1;
    }
}

/// Wherever a conversation ends for good, and whoever ends it: what did not come is an error to its reader,
/// and never an end.
#[test]
fn a_transfer_that_is_cut_for_good_at_any_record_is_an_error_and_never_an_end() {
    let bytes = pattern(300_000);
    let ends: [fn(&mut Pair); 4] = [
        // No tunnel comes back.
        |pair| {
            for side in [Side::Reacher, Side::Exposer] {
                pair.channel(side).detach();
                pair.channel(side).expire();
            }
        },
        // The exposer knows of nothing any more.
        |pair| {
            pair.exposer = Channel::new(Side::Exposer, pair.now, Duration::ZERO);
            pair.cut();
            pair.drive();
        },
        |pair| {
            pair.exposer.close(CloseCode::Normal);
            pair.drive();
        },
        |pair| {
            pair.reacher.close(CloseCode::Normal);
            pair.drive();
        },
    ];
    for end in ends {
        for (writer, reader) in [(Side::Reacher, Side::Exposer), (Side::Exposer, Side::Reacher)] {
            let mut cut_after = 0;
            loop {
                let mut pair = Pair::greeted();
                let stream = pair.open();
                let (mut sent, mut records) = (0, 0);
                let mut received = Vec::new();
                let mut part = [0; 20_000];
                let mut read = Ok(Got::Blocked);
                while records < cut_after && read != Ok(Got::Finished) {
                    sent += pair.channel(writer).write(stream, &bytes[sent..]).unwrap_or(0);
                    if sent == bytes.len() {
                        let _ = pair.channel(writer).finish(stream);
                    }
                    for side in [writer, reader] {
                        records += usize::from(records < cut_after && pair.step(side));
                    }
                    read = pair.channel(reader).read_into(stream, &mut part);
                    if let Ok(Got::Bytes(length)) = read {
                        received.extend_from_slice(&part[..length]);
                    }
                }
                if read == Ok(Got::Finished) {
                    assert!(received == bytes, "an end before the end");
                    assert!(cut_after > 10, "too few records to prove anything");
                    break;
                }
                end(&mut pair);
                loop {
                    match pair.channel(reader).read_into(stream, &mut part) {
                        Ok(Got::Bytes(_)) => {}
                        Ok(other) => panic!("{other:?} after a cut at {cut_after}"),
                        Err(_) => break,
                    }
                }
                cut_after += 1;
            }
        }
    }
}

#[test]
fn stream_opened_and_closed_without_a_tunnel_is_made_up_for() {
    let mut pair = Pair::greeted();
    pair.reacher.detach();
    pair.exposer.detach();
    let dropped = pair.reacher.open(Purpose::Target).expect("open without a tunnel");
    let used = pair.reacher.open(Purpose::Target).expect("open without a tunnel");
    pair.reacher.write(used, &b"written meanwhile"[..]).expect("room");
    pair.reacher.release(dropped);
    pair.attach();
    pair.drive();
    assert_eq!(pair.read_all(Side::Exposer, used), b"written meanwhile");
    assert!(!pair.reacher.streams.contains_key(&dropped));
}

#[test]
fn reset_without_a_tunnel_is_heard_on_the_next() {
    for (resetter, other) in [(Side::Reacher, Side::Exposer), (Side::Exposer, Side::Reacher)] {
        let mut pair = Pair::greeted();
        let stream = pair.open();
        pair.reacher.write(stream, &pattern(100_000)[..]).expect("room");
        pair.reacher.detach();
        pair.exposer.detach();
        pair.channel(resetter).release(stream);
        pair.attach();
        pair.drive();
        assert_eq!(
            pair.channel(other).read_into(stream, &mut [0; 8]),
            Err(StreamError::Reset(ResetCode::Aborted))
        );
        pair.channel(other).release(stream);
        assert!(pair.reacher.streams.is_empty() && pair.exposer.streams.is_empty());
    }
}

/// A stream that was lost whole, and reset before it was sent again, costs the channel no credit.
#[test]
fn credit_of_a_skipped_stream_comes_back() {
    let mut pair = Pair::greeted();
    let mut record = Vec::new();
    for _ in 0..70 {
        let stream = pair.reacher.open(Purpose::Target).expect("open");
        let taken = pair.reacher.write(stream, &pattern(300_000)[..]).expect("live");
        assert!(taken > 0, "the channel is out of credit");
        while pair.reacher.poll_transmit(pair.now, &mut record) {}
        pair.reacher.detach();
        pair.exposer.detach();
        pair.reacher.release(stream);
        pair.attach();
        pair.drive();
    }
    let stream = pair.open();
    pair.reacher.write(stream, &b"x"[..]).expect("room");
    pair.drive();
    assert_eq!(pair.read_all(Side::Exposer, stream), b"x");
}

/// A RESET that was lost with its tunnel, and whose stream is forgotten, costs no credit either.
#[test]
fn credit_of_a_lost_reset_comes_back() {
    let mut pair = Pair::greeted();
    let mut record = Vec::new();
    for _ in 0..70 {
        let stream = pair.open();
        pair.exposer.write(stream, &pattern(300_000)[..]).expect("room");
        while pair.exposer.poll_transmit(pair.now, &mut record) {}
        pair.reacher.release(stream);
        while pair.step(Side::Reacher) {}
        pair.exposer.release(stream);
        while pair.exposer.poll_transmit(pair.now, &mut record) {}
        pair.cut();
        pair.drive();
    }
    let stream = pair.open();
    pair.exposer.write(stream, &b"x"[..]).expect("room");
    pair.drive();
    assert_eq!(pair.read_all(Side::Reacher, stream), b"x");
}

/// The answer to the first tunnel is lost, and then the exposer forgets: what may have reached the target
/// is not sent to it a second time.
#[test]
fn early_bytes_reach_the_target_once() {
    let mut pair = Pair::new();
    let stream = pair.reacher.open(Purpose::Target).expect("open");
    pair.reacher.write(stream, &b"POST /pay"[..]).expect("room");
    while pair.step(Side::Reacher) {}
    assert_eq!(pair.exposer.waiting(stream), 9);
    pair.reacher.detach();
    pair.exposer = Channel::new(Side::Exposer, pair.now, Duration::ZERO);
    pair.attach();
    pair.drive();
    assert_eq!(pair.exposer.waiting(stream), 0);
    pair.assert_closed(Side::Reacher, CloseReason::Peer(CloseCode::Lost));
}

#[test]
fn exposer_that_restarted_says_that_the_channel_is_lost() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    pair.exposer = Channel::new(Side::Exposer, pair.now, Duration::ZERO);
    pair.cut();
    pair.drive();
    pair.assert_closed(Side::Reacher, CloseReason::Peer(CloseCode::Lost));
    assert_eq!(pair.reacher.read_into(stream, &mut [0; 8]), Err(StreamError::Closed));
}

#[test]
fn lists_of_thousands_of_streams_are_split() {
    let mut pair = Pair::greeted();
    let streams: Vec<_> =
        (0..3000).map(|_| pair.reacher.open(Purpose::Target).expect("open")).collect();
    pair.drive();
    for stream in &streams {
        pair.reacher.write(*stream, &b"abc"[..]).expect("room");
    }
    pair.cut();
    pair.drive();
    for stream in streams {
        assert_eq!(pair.read_all(Side::Exposer, stream), b"abc");
    }
}

/// A peer whose list cannot be true ends the channel.
#[test]
fn impossible_progress_closes_the_channel() {
    let stream = StreamId::FIRST;
    let second = stream.next().expect("even");
    let state = |received| StreamState { stream, received, max_data: 1 << 20, end: None };
    let cases = [
        ("received more than was sent", second, vec![state(100)]),
        ("lost what it had acknowledged", second, vec![state(3)]),
        ("knows streams that were never opened", StreamId::new(40).expect("even"), vec![state(10)]),
    ];
    for (name, next_stream, streams) in cases {
        let mut pair = Pair::greeted();
        pair.open();
        pair.reacher.write(stream, &b"0123456789"[..]).expect("room");
        pair.drive();
        pair.pass(ACK_DELAY);
        pair.cut();
        let (now, mut record) = (pair.now, Vec::new());
        let progress =
            Progress { next_stream, max_data: CHANNEL_WINDOW, received: 0, streams, more: false };
        for answer in [Record::Ready, Record::Welcome(progress)] {
            record.clear();
            answer.encode(&mut record);
            pair.reacher.handle(now, &record);
        }
        let mut events = std::iter::from_fn(|| pair.reacher.poll_event());
        let closed = events.any(|event| matches!(event, Event::Closed(CloseReason::Violation(_))));
        assert!(closed, "{name}");
    }
}

/// What a side makes of a tunnel on which the other says so of the channel. The reacher had sent ten bytes on
/// each of two streams.
fn resumed(side: Side, parts: Vec<Progress>) -> (Pair, Vec<Event>) {
    let mut pair = Pair::greeted();
    for _ in 0..2 {
        let stream = pair.open();
        pair.reacher.write(stream, &b"0123456789"[..]).expect("room");
    }
    pair.drive();
    pair.cut();
    let says = |progress| match side {
        Side::Reacher => Record::Welcome(progress),
        Side::Exposer => Record::Hello { new: false, progress },
    };
    let ready = (side == Side::Reacher).then_some(Record::Ready);
    let (now, mut bytes) = (pair.now, Vec::new());
    for record in ready.into_iter().chain(parts.into_iter().map(says)) {
        bytes.clear();
        record.encode(&mut bytes);
        pair.channel(side).handle(now, &bytes);
    }
    let events = std::iter::from_fn(|| pair.channel(side).poll_event()).collect();
    (pair, events)
}

#[test]
fn lists_that_contradict_what_was_said_before_close_the_channel() {
    let first = StreamId::FIRST;
    let second = first.next().expect("even");
    let third = second.next().expect("even");
    let part = |next_stream, received, streams: &[(StreamId, u64)], more| {
        let state = |&(stream, received)| StreamState {
            stream,
            received,
            max_data: INITIAL_STREAM_WINDOW,
            end: None,
        };
        let streams = streams.iter().map(state).collect();
        Progress { next_stream, max_data: CHANNEL_WINDOW, received, streams, more }
    };
    let (one, two) = ((first, 10), (second, 10));
    let (reacher, exposer) = (Side::Reacher, Side::Exposer);
    for (name, side, parts, violates) in [
        ("all is well", reacher, vec![part(third, 20, &[one, two], false)], false),
        ("more in all than was sent", reacher, vec![part(third, 21, &[one, two], false)], true),
        (
            "in two parts",
            reacher,
            vec![part(third, 20, &[one], true), part(third, 20, &[two], false)],
            false,
        ),
        (
            "parts out of order",
            reacher,
            vec![part(third, 20, &[two], true), part(third, 20, &[one], false)],
            true,
        ),
        (
            "a stream twice",
            reacher,
            vec![part(third, 20, &[one], true), part(third, 20, &[one, two], false)],
            true,
        ),
        ("nothing came", exposer, vec![part(third, 0, &[(first, 0), (second, 0)], false)], false),
        ("it forgot what it opened", exposer, vec![part(second, 0, &[(first, 0)], false)], true),
    ] {
        let (_, events) = resumed(side, parts);
        let closed = matches!(events.last(), Some(Event::Closed(CloseReason::Violation(_))));
        assert_eq!(closed, violates, "{name}: {events:?}");
        assert_eq!(events.contains(&Event::Established), !violates, "{name}: {events:?}");
    }
}

#[test]
fn a_stream_that_the_peer_forgot_is_lost_and_has_no_end() {
    let next_stream = StreamId::new(6).expect("even");
    let progress = Progress {
        next_stream,
        max_data: CHANNEL_WINDOW,
        received: 20,
        streams: Vec::new(),
        more: false,
    };
    let (mut pair, events) = resumed(Side::Reacher, vec![progress]);
    assert!(events.contains(&Event::Established), "{events:?}");
    for stream in [StreamId::FIRST, StreamId::new(4).expect("even")] {
        let read = pair.reacher.read_into(stream, &mut [0; 8]);
        assert_eq!(read, Err(StreamError::Reset(ResetCode::Lost)));
    }
}

#[test]
fn greedy_grants_make_nobody_keep_without_end() {
    let mut pair = Pair::greeted();
    let streams: Vec<_> = (0..20).map(|_| pair.open()).collect();
    let now = pair.now;
    let mut record = Vec::new();
    for stream in streams.iter().copied().map(Some).chain([None]) {
        record.clear();
        Record::Window { stream, max_data: u64::MAX }.encode(&mut record);
        pair.reacher.handle(now, &record);
    }
    let mut kept = 0;
    for stream in &streams {
        while let Ok(taken @ 1..) = pair.reacher.write(*stream, &pattern(100_000)[..]) {
            kept += taken;
            while pair.reacher.poll_transmit(now, &mut record) {}
        }
        let of_one = pair.reacher.streams[stream].send.kept() as u64;
        assert!(of_one <= MAX_STREAM_WINDOW + 128 * 1024);
    }
    assert_eq!(kept, MAX_KEPT);
    // What the peer acknowledges makes room for those who wait.
    while pair.reacher.poll_event().is_some() {}
    record.clear();
    Record::Ack { stream: streams[0], offset: 100_000 }.encode(&mut record);
    pair.reacher.handle(now, &record);
    assert_eq!(pair.reacher.poll_event(), Some(Event::Writable(streams[0])));
}

#[test]
fn bytes_arrive_once_and_in_order_through_every_buffer_boundary() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    let sent = pattern(3_000_000);
    let (mut offset, mut received) = (0, Vec::new());
    while received.len() < sent.len() {
        let chunk = &sent[offset..(offset + 77_777).min(sent.len())];
        offset += pair.reacher.write(stream, chunk).expect("live");
        pair.drive();
        received.extend(pair.read_all(Side::Exposer, stream));
    }
    assert!(received == sent);
}

#[test]
fn bytes_of_reset_streams_return_to_the_channel() {
    let mut pair = Pair::greeted();
    for _ in 0..3 * CHANNEL_WINDOW / INITIAL_STREAM_WINDOW {
        let stream = pair.open();
        pair.reacher.write(stream, &pattern(300_000)[..]).expect("live");
        pair.drive();
        pair.exposer.release(stream);
        pair.reacher.release(stream);
        pair.drive();
    }
    assert!(pair.reacher.streams.is_empty() && pair.exposer.streams.is_empty());
    let stream = pair.open();
    pair.reacher.write(stream, &b"still flowing"[..]).expect("room");
    pair.drive();
    assert_eq!(pair.read_all(Side::Exposer, stream), b"still flowing");
}

#[test]
fn window_grows_while_it_is_what_the_sender_waits_for() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    // A ping of 10 ms, then reads without a pause: each grant is used up within a round trip.
    pair.exposer.ping(pair.now);
    let mut record = Vec::new();
    while pair.exposer.poll_transmit(pair.now, &mut record) {
        pair.reacher.handle(pair.now, &record);
        record.clear();
    }
    pair.exposer.liveness.round_trip = None;
    pair.now += Duration::from_millis(10);
    pair.drive();
    assert!(pair.events.contains(&(Side::Exposer, Event::Ponged(Duration::from_millis(10)))));
    for _ in 0..400 {
        pair.reacher.write(stream, &pattern(100_000)[..]).expect("live");
        pair.drive();
        pair.read_all(Side::Exposer, stream);
    }
    let granted = &pair.reacher.streams[&stream].send;
    assert!(granted.credit() > MAX_STREAM_WINDOW / 2);
    assert!(granted.credit() <= MAX_STREAM_WINDOW);
}

#[test]
fn acknowledgements_wait_for_more_but_not_for_ever() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    pair.reacher.write(stream, &b"ping"[..]).expect("room");
    pair.drive();
    assert_eq!(pair.reacher.streams[&stream].send.unacknowledged(), 4);
    let deadline = pair.exposer.poll_timeout().expect("an ACK is due");
    assert!(deadline <= pair.now + ACK_DELAY);
    pair.pass(ACK_DELAY);
    assert_eq!(pair.exposer.delayed_until, None);
    assert_eq!(pair.reacher.streams[&stream].send.unacknowledged(), 0);
}

#[test]
fn quiet_channel_is_pinged_and_a_silent_one_is_dead() {
    let mut pair = Pair::greeted();
    pair.events.clear();
    pair.pass(KEEPALIVE);
    assert!(pair.events.iter().any(|(_, event)| matches!(event, Event::Ponged(_))));
    // Nothing is exchanged any more.
    pair.now += DEAD_AFTER;
    let now = pair.now;
    pair.reacher.handle_timeout(now);
    pair.exposer.handle_timeout(now);
    while pair.step(Side::Reacher) {}
    for side in [Side::Reacher, Side::Exposer] {
        assert!(pair.events.contains(&(side, Event::TunnelOver(None))));
        pair.channel(side).expire();
        while pair.step(side) {}
        pair.assert_closed(side, CloseReason::Expired);
    }
    assert_eq!(pair.reacher.poll_timeout(), None);
}

#[test]
fn closing_is_said_and_ends_every_stream() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    pair.exposer.close(CloseCode::ServiceGone);
    pair.drive();
    pair.assert_closed(Side::Exposer, CloseReason::Local);
    pair.assert_closed(Side::Reacher, CloseReason::Peer(CloseCode::ServiceGone));
    assert_eq!(pair.reacher.read_into(stream, &mut [0; 8]), Err(StreamError::Closed));
    assert_eq!(pair.reacher.open(Purpose::Target), Err(StreamError::Closed));
}

#[test]
fn channel_that_is_not_known_here_is_lost() {
    let now = Instant::now();
    let mut exposer = Channel::new(Side::Exposer, now, Duration::ZERO);
    exposer.attach(now);
    let mut record = Vec::new();
    let progress = Progress {
        next_stream: StreamId::FIRST,
        max_data: CHANNEL_WINDOW,
        received: 0,
        streams: Vec::new(),
        more: false,
    };
    Record::Hello { new: false, progress }.encode(&mut record);
    exposer.handle(now, &record);
    record.clear();
    assert!(exposer.poll_transmit(now, &mut record));
    assert_eq!(Record::decode(&record), Ok(Record::ChannelClose(CloseCode::Lost)));
    assert!(!exposer.poll_transmit(now, &mut record));
}

#[test]
fn limit_of_streams_is_kept_at_the_limit() {
    let mut pair = Pair::greeted();
    for _ in 0..MAX_STREAMS {
        pair.reacher.open(Purpose::Target).expect("below the limit");
    }
    assert_eq!(pair.reacher.open(Purpose::Target), Err(StreamError::Reset(ResetCode::Busy)));
    pair.drive();
    assert_eq!(pair.exposer.open_streams(), MAX_STREAMS);
    // A peer that does not keep to it is told stream by stream.
    pair.reacher.streams.pop_first();
    let over = pair.reacher.open(Purpose::Target).expect("the reacher forgot one");
    pair.drive();
    assert_eq!(pair.reacher.write(over, &b"x"[..]), Err(StreamError::Reset(ResetCode::Busy)));
}

/// Each record that breaks a rule ends the channel, at both sides, and nothing panics.
#[test]
fn violations_close_the_channel() {
    let stream = StreamId::FIRST;
    let never = StreamId::new(40).expect("even");
    let over = INITIAL_STREAM_WINDOW;
    let cases: [(&str, Vec<Record<'_>>); 16] = [
        ("gap", vec![Record::Data { stream, offset: 1, bytes: b"x" }]),
        ("credit", vec![Record::Data { stream, offset: over, bytes: b"x" }]),
        ("unopened data", vec![Record::Data { stream: never, offset: 0, bytes: b"x" }]),
        ("unopened fin", vec![Record::Fin { stream: never, total: 0 }]),
        ("unopened ack", vec![Record::Ack { stream: never, offset: 0 }]),
        ("ack unsent", vec![Record::Ack { stream, offset: 1 }]),
        ("early fin", vec![Record::Fin { stream, total: 1 }]),
        (
            "past fin",
            vec![Record::Fin { stream, total: 0 }, Record::Data { stream, offset: 0, bytes: b"x" }],
        ),
        (
            "two totals",
            vec![
                Record::Data { stream, offset: 0, bytes: b"x" },
                Record::Fin { stream, total: 1 },
                Record::Reset { stream, code: ResetCode::Aborted, total: 2 },
            ],
        ),
        (
            "reset below",
            vec![
                Record::Data { stream, offset: 0, bytes: b"xy" },
                Record::Reset { stream, code: ResetCode::Aborted, total: 1 },
            ],
        ),
        ("reset beyond", vec![Record::Reset { stream, code: ResetCode::Aborted, total: over + 1 }]),
        ("open again", vec![Record::Open { stream, purpose: Purpose::Target }]),
        ("second greeting", vec![Record::Ready]),
        ("trust entries", vec![Record::TrustGet(Vec::new())]),
        ("rekey out of turn", vec![Record::HsWant(1)]),
        ("target answered", vec![Record::Opened(stream)]),
    ];
    for (name, records) in cases {
        let mut pair = Pair::greeted();
        pair.open();
        let mut bytes = Vec::new();
        for record in records {
            bytes.clear();
            record.encode(&mut bytes);
            let now = pair.now;
            pair.exposer.handle(now, &bytes);
        }
        // Before anything is answered: an honest answer to what was wrong breaks rules, too.
        let events: Vec<_> = std::iter::from_fn(|| pair.exposer.poll_event()).collect();
        let violated = matches!(events.last(), Some(Event::Closed(CloseReason::Violation(_))));
        assert!(violated, "{name}: {events:?}");
        pair.drive();
        pair.assert_closed(Side::Reacher, CloseReason::Peer(CloseCode::Protocol));
    }
}

#[test]
fn an_exposer_that_opens_a_stream_breaks_the_protocol() {
    let mut pair = Pair::greeted();
    let mut record = Vec::new();
    Record::Open { stream: StreamId::FIRST, purpose: Purpose::Target }.encode(&mut record);
    let now = pair.now;
    pair.reacher.handle(now, &record);
    let last = std::iter::from_fn(|| pair.reacher.poll_event()).last();
    assert!(matches!(last, Some(Event::Closed(CloseReason::Violation(_)))), "{last:?}");
}

#[test]
fn a_grant_below_the_one_before_changes_nothing() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    for of in [Some(stream), None] {
        let mut record = Vec::new();
        Record::Window { stream: of, max_data: 1 }.encode(&mut record);
        let now = pair.now;
        pair.reacher.handle(now, &record);
    }
    pair.reacher.write(stream, &pattern(1000)[..]).expect("room");
    pair.drive();
    assert_eq!(pair.read_all(Side::Exposer, stream), pattern(1000));
}

/// Nobody reads, so a stream takes what was granted at its beginning, and not a byte more.
#[test]
fn credit_of_a_stream_is_enforced_at_the_byte() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    let all = pattern(usize::try_from(INITIAL_STREAM_WINDOW).expect("small"));
    let mut record = Vec::new();
    let mut send = |pair: &mut Pair, offset: usize, bytes: &[u8]| {
        record.clear();
        Record::Data { stream, offset: offset as u64, bytes }.encode(&mut record);
        let now = pair.now;
        pair.exposer.handle(now, &record);
        std::iter::from_fn(|| pair.exposer.poll_event()).last()
    };
    for (number, part) in all.chunks(MAX_DATA_BYTES).enumerate() {
        let last = send(&mut pair, number * MAX_DATA_BYTES, part);
        assert!(!matches!(last, Some(Event::Closed(_))), "{last:?}");
    }
    assert_eq!(pair.exposer.waiting(stream), all.len());
    let last = send(&mut pair, all.len(), b"x");
    assert!(matches!(last, Some(Event::Closed(CloseReason::Violation(_)))), "{last:?}");
}

/// What a RESET tells of and never came counts in the credit of the channel, on both sides alike.
#[test]
fn bytes_that_a_reset_tells_of_count_as_received() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    for record in [
        Record::Data { stream, offset: 0, bytes: b"0123456789" },
        Record::Reset { stream, code: ResetCode::Aborted, total: 100 },
    ] {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let now = pair.now;
        pair.exposer.handle(now, &bytes);
    }
    assert_eq!(pair.exposer.credit.received, 100);
    assert_eq!(pair.exposer.credit.consumed, 100);
    let now = pair.now;
    let part = pair.exposer.progress(now).remove(0);
    assert_eq!(part.received, 100);
}

#[test]
fn bytes_that_come_again_are_read_once() {
    let mut pair = Pair::greeted();
    let stream = pair.open();
    for (offset, bytes) in [(0, &b"abc"[..]), (1, b"bcd"), (0, b"ab"), (4, b"e"), (4, b"ef")] {
        let mut record = Vec::new();
        Record::Data { stream, offset, bytes }.encode(&mut record);
        let now = pair.now;
        pair.exposer.handle(now, &record);
    }
    let mut part = [0; 16];
    let mut read = Vec::new();
    while let Ok(Got::Bytes(length)) = pair.exposer.read_into(stream, &mut part) {
        read.extend_from_slice(&part[..length]);
    }
    assert_eq!(read, b"abcdef");
}

#[test]
fn channel_credit_is_enforced() {
    let mut pair = Pair::greeted();
    let now = pair.now;
    let streams = CHANNEL_WINDOW / INITIAL_STREAM_WINDOW + 1;
    let chunk = vec![0; MAX_DATA_BYTES];
    let mut record = Vec::new();
    for number in 0..u32::try_from(streams).expect("few") {
        let stream = StreamId::new(2 + 2 * number).expect("even");
        record.clear();
        Record::Open { stream, purpose: Purpose::Target }.encode(&mut record);
        pair.exposer.handle(now, &record);
        for offset in (0..INITIAL_STREAM_WINDOW).step_by(MAX_DATA_BYTES) {
            record.clear();
            Record::Data { stream, offset, bytes: &chunk }.encode(&mut record);
            pair.exposer.handle(now, &record);
        }
    }
    let mut last = None;
    while let Some(event) = pair.exposer.poll_event() {
        last = Some(event);
    }
    assert_eq!(
        last,
        Some(Event::Closed(CloseReason::Violation(ProtocolViolation(
            "bytes beyond the channel's credit"
        ))))
    );
}

#[test]
fn unknown_record_ends_the_channel() {
    let mut pair = Pair::greeted();
    let now = pair.now;
    pair.exposer.handle(now, &[0x34, 1, 2, 3]);
    pair.drive();
    pair.assert_closed(Side::Exposer, CloseReason::Record(RecordError::Type(0x34)));
}

/// Rekeying waits for the greeting, whose last records are the exposer's.
#[test]
fn a_side_is_greeted_when_its_own_part_is_out_and_the_peers_part_is_in() {
    let mut pair = Pair::new();
    let states = |pair: &Pair| {
        let of = |channel: &Channel| (channel.is_greeting(), channel.is_greeted());
        (of(&pair.reacher), of(&pair.exposer))
    };
    let (greeting, saying, greeted) = ((true, false), (false, false), (false, true));
    assert_eq!(states(&pair), (greeting, greeting));
    assert!(pair.step(Side::Reacher), "HELLO");
    assert_eq!(states(&pair), (greeting, saying));
    assert!(pair.step(Side::Exposer), "READY");
    assert_eq!(states(&pair), (greeting, saying));
    assert!(pair.step(Side::Exposer), "WELCOME");
    assert_eq!(states(&pair), (greeted, greeted));
    pair.reacher.close(CloseCode::Normal);
    assert_eq!(states(&pair), ((false, false), greeted));
}

#[test]
fn a_rekey_before_the_greeting_is_over_ends_the_channel() {
    let rekey = connect_spec::record::RekeyTry { number: 1, attempt: 0 };
    for hostile in [
        Record::HsWant(1),
        Record::Hs1 { rekey, message: &[0; 96] },
        Record::Hs2 { rekey, message: &[0; 96] },
        Record::Switch(rekey),
    ] {
        for (side, other) in [(Side::Reacher, Side::Exposer), (Side::Exposer, Side::Reacher)] {
            let mut pair = Pair::new();
            let (now, mut record) = (pair.now, Vec::new());
            hostile.encode(&mut record);
            pair.channel(side).handle(now, &record);
            pair.drive();
            let violation = ProtocolViolation("a record before the greeting");
            pair.assert_closed(side, CloseReason::Violation(violation));
            pair.assert_closed(other, CloseReason::Peer(CloseCode::Protocol));
        }
    }
}

#[derive(Debug, Clone)]
enum Action {
    Open { purpose: u8 },
    Write { side: bool, stream: u8, length: u16 },
    Read { side: bool, stream: u8, length: u16 },
    Finish { side: bool, stream: u8 },
    Reset { side: bool, stream: u8 },
    Step { side: bool, records: u8 },
    Pass { millis: u8 },
    Cut,
}

fn action() -> impl Strategy<Value = Action> {
    let side = any::<bool>;
    let stream = || 0u8..6;
    prop_oneof![
        1 => (0u8..6).prop_map(|purpose| Action::Open { purpose }),
        6 => (side(), stream(), any::<u16>()).prop_map(|(side, stream, length)| Action::Write { side, stream, length }),
        6 => (side(), stream(), any::<u16>()).prop_map(|(side, stream, length)| Action::Read { side, stream, length }),
        1 => (side(), stream()).prop_map(|(side, stream)| Action::Finish { side, stream }),
        1 => (side(), stream()).prop_map(|(side, stream)| Action::Reset { side, stream }),
        8 => (side(), any::<u8>()).prop_map(|(side, records)| Action::Step { side, records }),
        1 => any::<u8>().prop_map(|millis| Action::Pass { millis }),
        1 => Just(Action::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever two honest applications do, no rule is broken, and what is read is a prefix of what
    /// was written, byte for byte.
    #[test]
    fn honest_sides_never_disagree(actions in proptest::collection::vec(action(), 1..200)) {
        let mut pair = Pair::greeted();
        let mut written: BTreeMap<(bool, StreamId), u64> = BTreeMap::new();
        let mut read: BTreeMap<(bool, StreamId), u64> = BTreeMap::new();
        let which = |side: bool| if side { Side::Reacher } else { Side::Exposer };
        let stream_of = |number: u8| StreamId::new(2 + 2 * u32::from(number)).expect("even");
        for action in actions {
            match action {
                Action::Open { purpose } => { let _ = pair.reacher.open(Purpose::from_number(purpose)); }
                Action::Write { side, stream, length } => {
                    let id = stream_of(stream);
                    let done = written.entry((side, id)).or_default();
                    let bytes: Vec<u8> = (*done..*done + u64::from(length)).map(|at| (at % 253) as u8).collect();
                    if let Ok(taken) = pair.channel(which(side)).write(id, &bytes[..]) {
                        *done += taken as u64;
                    }
                }
                Action::Read { side, stream, length } => {
                    let id = stream_of(stream);
                    let mut out = vec![0; usize::from(length)];
                    if let Ok(Got::Bytes(count)) = pair.channel(which(side)).read_into(id, &mut out) {
                        let done = read.entry((side, id)).or_default();
                        for byte in &out[..count] {
                            prop_assert_eq!(*byte, (*done % 253) as u8);
                            *done += 1;
                        }
                    }
                }
                Action::Finish { side, stream } => { let _ = pair.channel(which(side)).finish(stream_of(stream)); }
                Action::Reset { side, stream } => pair.channel(which(side)).reset(stream_of(stream), ResetCode::Aborted),
                Action::Step { side, records } => {
                    for _ in 0..records {
                        pair.step(which(side));
                    }
                }
                Action::Cut => pair.cut(),
                Action::Pass { millis } => {
                    pair.now += Duration::from_millis(millis.into());
                    let now = pair.now;
                    pair.reacher.handle_timeout(now);
                    pair.exposer.handle_timeout(now);
                }
            }
        }
        pair.drive();
        for ((side, id), count) in &read {
            let sent = written.get(&(!side, *id)).copied().unwrap_or(0);
            prop_assert!(*count <= sent);
        }
        let closed = pair.events.iter().any(|(_, event)| matches!(event, Event::Closed(_)));
        prop_assert!(!closed, "an honest channel was closed: {:?}", pair.events);
    }

    #[test]
    fn garbage_never_panics(records in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20)) {
        let mut pair = Pair::greeted();
        pair.reacher.open(Purpose::Target).expect("open channel");
        let now = pair.now;
        for record in &records {
            pair.reacher.handle(now, record);
            pair.exposer.handle(now, record);
        }
        let mut record = Vec::new();
        for channel in [&mut pair.reacher, &mut pair.exposer] {
            while channel.poll_transmit(now, &mut record) {}
            while channel.poll_event().is_some() {}
        }
    }
}

/// A peer that asks and never reads is not listened to without end; one that reads is again.
#[test]
fn answers_that_nobody_takes_stop_the_questions() {
    let mut pair = Pair::greeted();
    let (now, mut record) = (pair.now, Vec::new());
    Record::Ping(7).encode(&mut record);
    for _ in 1..MAX_OUTBOX {
        pair.exposer.handle(now, &record);
    }
    assert!(!pair.exposer.is_backed_up());
    pair.exposer.handle(now, &record);
    assert!(pair.exposer.is_backed_up());
    assert!(pair.exposer.poll_transmit(now, &mut record));
    assert!(!pair.exposer.is_backed_up());
}

/// How the reacher's stream was reset, if it was.
fn reset_of(pair: &mut Pair, stream: StreamId) -> Option<ResetCode> {
    match pair.reacher.room(stream) {
        Err(StreamError::Reset(code)) => Some(code),
        Ok(_) | Err(StreamError::Closed) => None,
    }
}

#[test]
fn a_purpose_survives_a_tunnel_that_is_lost_before_the_exposer_heard_of_it() {
    for purpose in [Purpose::Target, Purpose::Check, Purpose::Sink, Purpose::Source] {
        for greeted in [false, true] {
            let mut pair = if greeted { Pair::greeted() } else { Pair::new() };
            let stream = pair.reacher.open(purpose).expect("open channel");
            pair.reacher.write(stream, &b"asked"[..]).expect("room");
            pair.cut();
            pair.drive();
            let incoming = |(side, event): &&(Side, Event)| {
                *side == Side::Exposer && matches!(event, Event::Incoming(..))
            };
            let seen: Vec<_> =
                pair.events.iter().filter(incoming).map(|(_, event)| *event).collect();
            assert_eq!(seen, [Event::Incoming(stream, purpose)]);
            assert_eq!(pair.read_all(Side::Exposer, stream), b"asked");
        }
    }
}

#[test]
fn checks_beyond_the_limit_are_busy_and_streams_to_the_target_are_not() {
    let mut pair = Pair::greeted();
    let purposes = [Purpose::Check, Purpose::Sink, Purpose::Source].into_iter().cycle();
    let open = |pair: &mut Pair, purpose| {
        let stream = pair.reacher.open(purpose).expect("open channel");
        pair.drive();
        stream
    };
    let checks: Vec<_> =
        purposes.take(MAX_CHECKS).map(|purpose| open(&mut pair, purpose)).collect();
    for check in &checks {
        assert_eq!(reset_of(&mut pair, *check), None, "at the limit");
    }
    let over = open(&mut pair, Purpose::Check);
    assert_eq!(reset_of(&mut pair, over), Some(ResetCode::Busy));
    let target = open(&mut pair, Purpose::Target);
    assert_eq!(reset_of(&mut pair, target), None);
    // One that the exposer is done with makes room.
    pair.exposer.release(checks[0]);
    pair.drive();
    let next = open(&mut pair, Purpose::Sink);
    assert_eq!(reset_of(&mut pair, next), None);
}

#[test]
fn an_unknown_purpose_is_refused_by_name_and_harms_nothing() {
    let mut pair = Pair::greeted();
    for number in [4, 255] {
        let stream = pair.reacher.open(Purpose::Other(number)).expect("open channel");
        pair.drive();
        assert_eq!(reset_of(&mut pair, stream), Some(ResetCode::UnknownPurpose));
        assert_eq!(pair.exposer.open_streams(), 0);
    }
    assert!(!pair.events.iter().any(|(_, event)| matches!(event, Event::Incoming(..))));
    pair.open();
}

#[test]
fn a_ping_waits_for_no_tunnel_and_holds_up_no_greeting() {
    let mut pair = Pair::greeted();
    pair.reacher.detach();
    pair.exposer.detach();
    let now = pair.now;
    pair.reacher.ping(now);
    pair.attach();
    pair.drive();
    assert!(pair.reacher.is_greeted());
}
