//! Two channels, the tunnels between them and the applications at both ends: four bytes of input are one
//! thing that happens. What arrives is held against what was sent, byte for byte.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::OnceLock,
    time::{Duration, Instant},
};

use bytes::Bytes;
use connect_spec::record::{CloseCode, Purpose, ResetCode, StreamId};

use crate::engine::channel::{Channel, CloseReason, Event, Read, Side, StreamError};

/// More of them would only be slower.
const MOST_STEPS: usize = 160;
/// A record is delivered to each side at most so often before both come to rest.
const MOST_ROUNDS: usize = 5000;

/// One direction of a stream, as its writer and its reader see it.
#[derive(Default)]
struct Direction {
    written: u64,
    finished: bool,
    read: u64,
    ended: bool,
}

/// A stream, by the side that writes.
#[derive(Default)]
struct Stream {
    from: [Direction; 2],
    released: [bool; 2],
    /// The exposer was told of it.
    incoming: bool,
    /// One side reset it, or it has a purpose that the exposer may refuse.
    disturbed: bool,
}

struct World {
    channels: [Channel; 2],
    attached: [bool; 2],
    /// Records under way, by the side that sent them.
    wires: [VecDeque<Vec<u8>>; 2],
    now: Instant,
    streams: BTreeMap<StreamId, Stream>,
    /// The exposer was greeted on some tunnel.
    established: bool,
    /// No record came from elsewhere, and no side closed.
    honest: bool,
}

fn pattern(id: StreamId, side: usize, at: u64) -> u8 {
    let number = u64::from(id.number()) * 7 + side as u64 * 101 + at;
    u8::try_from(number % 251).expect("below 251")
}

impl World {
    fn new() -> Self {
        // Any moment does, and a run is the same each time: nobody looks at the clock.
        static BEGINNING: OnceLock<Instant> = OnceLock::new();
        let now = *BEGINNING.get_or_init(Instant::now);
        let channel = |side| Channel::new(side, now, Duration::ZERO);
        let mut world = Self {
            channels: [channel(Side::Reacher), channel(Side::Exposer)],
            attached: [false; 2],
            wires: Default::default(),
            now,
            streams: BTreeMap::new(),
            established: false,
            honest: true,
        };
        world.attach();
        world
    }

    /// Brings a new tunnel; what was in the old one is lost.
    fn attach(&mut self) {
        self.wires = Default::default();
        for side in 0..2 {
            self.channels[side].attach(self.now);
            self.attached[side] = true;
        }
    }

    /// A side notices that the tunnel is lost; the other one may not know yet.
    fn detach(&mut self, side: usize) {
        self.channels[side].detach();
        self.attached[side] = false;
        self.wires[1 - side].clear();
    }

    fn events(&mut self) {
        for side in 0..2 {
            while let Some(event) = self.channels[side].poll_event() {
                match event {
                    Event::Incoming(id, purpose) => {
                        assert_eq!(side, 1);
                        if self.honest {
                            let stream = self.streams.get_mut(&id).expect("it was opened");
                            assert!(!stream.incoming, "an exposer is told of a stream once");
                            assert!(purpose == Purpose::Target || stream.disturbed);
                        }
                        self.streams.entry(id).or_default().incoming = true;
                    }
                    Event::TunnelOver(code) => {
                        assert!(code.is_none() || !self.honest);
                        self.attached[side] = false;
                    }
                    Event::Closed(CloseReason::Local) if side == 1 && !self.established => {
                        // The reacher carries on what it began on a tunnel that was lost before the
                        // exposer heard of it.
                        self.honest = false;
                    }
                    Event::Closed(reason) => assert!(!self.honest, "closed for {reason:?}"),
                    Event::Established => self.established |= side == 1,
                    Event::Readable(_) | Event::Writable(_) | Event::Ponged(_) => {}
                }
            }
        }
    }

    /// Puts the next record of a side on its wire.
    fn transmit(&mut self, side: usize) -> bool {
        let mut record = Vec::new();
        let sent = self.channels[side].poll_transmit(self.now, &mut record);
        assert_eq!(sent, !record.is_empty());
        if sent && self.attached[1 - side] {
            self.wires[side].push_back(record);
        }
        sent
    }

    /// Hands the next record on the wire to the other side, if that takes any.
    fn deliver(&mut self, from: usize) -> bool {
        let to = 1 - from;
        if !self.attached[to] || self.channels[to].is_backed_up() {
            return false;
        }
        let Some(record) = self.wires[from].pop_front() else { return false };
        self.channels[to].handle_record(self.now, &Bytes::from(record));
        self.events();
        true
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        for side in 0..2 {
            self.channels[side].handle_timeout(self.now);
        }
        self.events();
    }

    fn open(&mut self, purpose: Purpose) {
        if let Ok(id) = self.channels[0].open(purpose) {
            let disturbed = purpose != Purpose::Target;
            let before = self.streams.insert(id, Stream { disturbed, ..Stream::default() });
            assert!(before.is_none() || !self.honest, "a stream has a number of its own");
        }
    }

    /// What an error on a stream may mean.
    fn excused(&self, id: StreamId, side: usize, error: StreamError) {
        let stream = &self.streams[&id];
        let excused = match error {
            StreamError::Reset(_) => stream.disturbed,
            StreamError::Closed => {
                stream.released[side] || stream.disturbed || (side == 1 && !stream.incoming)
            }
        };
        assert!(excused || !self.honest, "{id:?} is {error:?} for {side}");
    }

    fn write(&mut self, id: StreamId, side: usize, length: u64) {
        let before = self.streams[&id].from[side].written;
        let bytes: Vec<u8> = (before..before + length).map(|at| pattern(id, side, at)).collect();
        match self.channels[side].write(id, bytes.as_slice()) {
            Ok(taken) => {
                let direction = &mut self.stream(id).from[side];
                assert!(taken as u64 <= length && !direction.finished);
                direction.written += taken as u64;
            }
            Err(StreamError::Closed) if self.streams[&id].from[side].finished => {}
            Err(error) => self.excused(id, side, error),
        }
    }

    fn read(&mut self, id: StreamId, side: usize, most: usize) -> bool {
        let read = self.channels[side].read(id, most);
        let honest = self.honest;
        let stream = self.stream(id);
        let (disturbed, direction) = (stream.disturbed, &mut stream.from[1 - side]);
        match read {
            Ok(Read::Bytes(bytes)) => {
                assert!((1..=most).contains(&bytes.len()));
                if honest {
                    for byte in &bytes {
                        assert_eq!(*byte, pattern(id, 1 - side, direction.read));
                        direction.read += 1;
                    }
                    assert!(direction.read <= direction.written && !direction.ended);
                }
                return true;
            }
            Ok(Read::Finished) => {
                let whole = direction.finished && direction.read == direction.written;
                assert!(whole || !honest, "an end before the end");
                direction.ended = true;
            }
            Ok(Read::Blocked) => assert!(!direction.ended || disturbed || !honest),
            Err(error) => self.excused(id, side, error),
        }
        false
    }

    fn finish(&mut self, id: StreamId, side: usize) {
        match self.channels[side].finish(id) {
            Ok(()) => self.stream(id).from[side].finished = true,
            Err(error) => self.excused(id, side, error),
        }
    }

    fn release(&mut self, id: StreamId, side: usize) {
        self.channels[side].release(id);
        let stream = self.stream(id);
        stream.disturbed |= !(stream.from[side].finished && stream.from[1 - side].ended);
        stream.released[side] = true;
    }

    fn stream(&mut self, id: StreamId) -> &mut Stream {
        self.streams.get_mut(&id).expect("the caller found it here")
    }

    /// One of the streams that were opened.
    fn pick(&self, number: u8) -> Option<StreamId> {
        let count = self.streams.len().max(1);
        self.streams.keys().nth(usize::from(number) % count).copied()
    }

    /// Lets both sides say, and the applications read, all that there is.
    fn rest(&mut self) {
        let mut idle = 0;
        for _ in 0..MOST_ROUNDS {
            let mut moved = false;
            for side in 0..2 {
                moved |= self.transmit(side) | self.deliver(side);
            }
            let ids: Vec<_> = self.streams.keys().copied().collect();
            for id in ids {
                for side in 0..2 {
                    if !self.streams[&id].released[side] {
                        moved |= self.read(id, side, 1 << 20);
                    }
                }
            }
            idle = if moved { 0 } else { idle + 1 };
            if idle > 2 {
                return;
            }
            if !moved {
                self.pass(Duration::from_millis(30));
            }
        }
        panic!("the two sides never come to rest");
    }

    /// On a tunnel that lasts, everything that was written arrives, and nothing stays behind.
    fn settle(&mut self) {
        self.attach();
        self.rest();
        for (id, stream) in &self.streams {
            for side in 0..2 {
                let direction = &stream.from[side];
                let whole =
                    direction.read == direction.written && direction.ended == direction.finished;
                assert!(whole || stream.disturbed || !self.honest, "{id:?} lost what {side} wrote");
            }
        }
        let ids: Vec<_> = self.streams.keys().copied().collect();
        for id in &ids {
            for side in 0..2 {
                self.release(*id, side);
            }
        }
        self.rest();
        if self.honest {
            for id in ids {
                for channel in &mut self.channels {
                    assert_eq!(channel.room(id), Err(StreamError::Closed), "it is forgotten");
                }
            }
            self.channels.iter().for_each(|channel| assert_eq!(channel.open_streams(), 0));
        }
    }
}

/// Whatever two applications and the network do, what is read is what was written; whatever a peer sends,
/// nothing panics.
pub(crate) fn run(input: &[u8]) {
    let mut world = World::new();
    let mut rest = input;
    for _ in 0..MOST_STEPS {
        let Some(([action, who, high, low], more)) = rest.split_first_chunk::<4>() else { break };
        rest = more;
        let side = usize::from(who & 1);
        let amount = u16::from_be_bytes([*high, *low]);
        let picked = world.pick(who >> 1);
        match (action % 16, picked) {
            (0, _) => world.open(Purpose::Target),
            (1, _) => world.open(Purpose::from_number(high % 6)),
            (2 | 3, Some(id)) => world.write(id, side, u64::from(amount)),
            (4 | 5, Some(id)) => {
                world.read(id, side, usize::from(amount));
            }
            (6, Some(id)) => world.finish(id, side),
            (7, Some(id)) if amount % 4 == 0 => world.release(id, side),
            // Only the exposer has a target that answers.
            (7, Some(id)) => world.channels[1].opened(id),
            (8 | 9, _) => (0..=low % 16).for_each(|_| {
                world.transmit(side);
            }),
            (10 | 11, _) => (0..=low % 16).for_each(|_| {
                world.deliver(side);
            }),
            (12, _) => world.pass(Duration::from_millis(u64::from(amount >> 2))),
            (13, _) => world.attach(),
            (14, _) if amount % 8 < 7 => world.detach(side),
            (14, _) => world.channels[side].ping(world.now),
            // What a hostile peer does: a record of any bytes, or a close.
            (15, _) if high % 8 == 7 => {
                world.honest = false;
                let (record, more) = rest.split_at(usize::from(*low).min(rest.len()));
                rest = more;
                world.channels[side].handle_record(world.now, &Bytes::copy_from_slice(record));
            }
            (15, _) if high % 8 == 6 => {
                world.honest = false;
                world.channels[side].close(CloseCode::Normal);
            }
            (15, Some(id)) if high % 8 == 5 => {
                world.channels[side].reset(id, ResetCode::Aborted);
                world.stream(id).disturbed = true;
            }
            _ => {}
        }
        world.events();
    }
    world.settle();
}

/// Conversations of different kinds.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let greet = [[8, 0, 0, 1], [10, 0, 0, 3], [8, 1, 0, 3], [10, 1, 0, 3]];
    let seed = |steps: &[[u8; 4]]| [&greet[..], steps].concat().concat();
    let ping = [0x40, 0, 0, 0, 0, 0, 0, 0, 7];
    let hostile = [&[15, 1, 7, 9][..], &ping].concat();
    vec![
        (
            "half_close",
            seed(&[
                [0, 0, 0, 0],
                [2, 0, 0x80, 0],
                [6, 0, 0, 0],
                [8, 0, 0, 15],
                [10, 0, 0, 15],
                [4, 1, 0xff, 0xff],
                [2, 1, 0xff, 0],
                [6, 1, 0, 0],
            ]),
        ),
        (
            "cut",
            seed(&[
                [0, 0, 0, 0],
                [2, 0, 0xff, 0xff],
                [8, 0, 0, 3],
                [10, 0, 0, 1],
                [14, 1, 0, 0],
                [2, 0, 0, 9],
                [13, 0, 0, 0],
                [8, 0, 0, 0],
                [10, 0, 0, 0],
                [13, 0, 0, 0],
            ]),
        ),
        (
            "reset",
            seed(&[
                [0, 0, 0, 0],
                [1, 0, 1, 0],
                [2, 2, 9, 9],
                [7, 0, 0, 0],
                [15, 3, 5, 0],
                [12, 0, 0xff, 0],
            ]),
        ),
        ("hostile", [seed(&[[0, 0, 0, 0]]), hostile].concat()),
        ("early", [[0, 0, 0, 0], [2, 0, 1, 0], [8, 0, 0, 15], [13, 0, 0, 0]].concat()),
    ]
}
