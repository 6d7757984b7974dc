//! Vectors of the channel: what one side is given and does, and what it must make of it. The agent's tests
//! run them through its state machine (`agent/src/engine/channel/tests/vectors.rs`).

use connect_spec::{
    limits::{CHANNEL_WINDOW, INITIAL_STREAM_WINDOW},
    record::{CloseCode, End, Progress, Purpose, Record, ResetCode, StreamId, StreamState},
};
use serde_json::{Value, json};

use super::{File, hex};

/// As many bytes as a stream may have before a WINDOW.
const WINDOW: u64 = INITIAL_STREAM_WINDOW;
/// As many streams as fill the credit of a channel.
const FULL_STREAMS: u64 = CHANNEL_WINDOW / WINDOW;

pub(super) fn channels() -> File {
    let mut file = File::new(
        "channels",
        "One side of a channel: what it gets and does in `steps`, in this order, and what must come of it. \
         A must-fail case is sound up to its last step, a record that must be answered with \
         CHANNEL_CLOSE(1). README.md explains the steps",
    );
    on_one_tunnel(&mut file);
    on_the_next_tunnel(&mut file);
    out_of_turn(&mut file);
    bytes_that_must_not_be(&mut file);
    lists_that_must_not_be(&mut file);
    file
}

/// The steps of one case.
#[derive(Clone)]
struct Script {
    side: &'static str,
    steps: Vec<Value>,
}

impl Script {
    fn new(side: &'static str) -> Self {
        Self { side, steps: Vec::new() }
    }

    /// An exposer on the first tunnel of a channel, greeted.
    fn exposer() -> Self {
        Self::new("exposer").tunnel().gets(&hello(true, progress(2, 0, &[])))
    }

    /// A reacher on the first tunnel of a channel, greeted.
    fn reacher() -> Self {
        Self::new("reacher").tunnel().welcomed(progress(2, 0, &[]))
    }

    fn step(mut self, step: Value) -> Self {
        self.steps.push(step);
        self
    }

    /// A new tunnel is there; the one before, if there was one, is lost.
    fn tunnel(self) -> Self {
        self.step(json!({ "tunnel": "new" }))
    }

    fn lost(self) -> Self {
        self.step(json!({ "tunnel": "lost" }))
    }

    fn gets(self, record: &Record<'_>) -> Self {
        let mut wire = Vec::new();
        record.encode(&mut wire);
        self.step(json!({ "gets": hex(wire) }))
    }

    fn welcomed(self, progress: Progress) -> Self {
        self.gets(&Record::Ready).gets(&Record::Welcome(progress))
    }

    /// The next bytes of a stream, all zero.
    fn gets_zeros(self, stream: u32, count: u64) -> Self {
        self.step(json!({ "gets_zeros": { "stream": stream, "count": count } }))
    }

    fn gets_open(self, stream: u32) -> Self {
        self.gets(&open(stream))
    }

    fn gets_data(self, stream: u32, offset: u64, bytes: &str) -> Self {
        self.gets(&data(stream, offset, bytes))
    }

    fn opens(self, stream: u32) -> Self {
        self.step(json!({ "opens": stream }))
    }

    fn writes(self, stream: u32, bytes: &str) -> Self {
        self.step(json!({ "writes": { "stream": stream, "bytes": hex(bytes) } }))
    }

    fn finishes(self, stream: u32) -> Self {
        self.step(json!({ "finishes": stream }))
    }

    fn resets(self, stream: u32) -> Self {
        self.step(json!({ "resets": stream }))
    }

    /// What it reads of a stream, and the end that it sees.
    fn reads(self, stream: u32, bytes: &str, end: Value) -> Self {
        self.step(json!({ "reads": { "stream": stream, "bytes": hex(bytes), "end": end } }))
    }

    /// What it has said since the last step of this kind, or since the tunnel began: its greeting, if that
    /// is part of it, and what concerns each stream.
    fn says(self, greeting: Value, streams: &[Value]) -> Self {
        self.step(json!({ "says": { "greeting": greeting, "streams": streams } }))
    }

    fn valid(self, file: &mut File, name: &str) {
        file.valid(name, json!({ "side": self.side, "steps": self.steps }));
    }

    /// `reason` is what the agent's state machine says of it, which its tests compare.
    fn invalid(self, file: &mut File, name: &str, reason: &'static str) {
        let fields = json!({ "side": self.side, "steps": self.steps });
        file.invalid(name, Err::<(), _>(reason), fields);
    }
}

fn id(number: u32) -> StreamId {
    StreamId::new(number).expect("even")
}

fn open(stream: u32) -> Record<'static> {
    Record::Open { stream: id(stream), purpose: Purpose::Target }
}

fn data(stream: u32, offset: u64, bytes: &str) -> Record<'_> {
    Record::Data { stream: id(stream), offset, bytes: bytes.as_bytes() }
}

fn ack(stream: u32, offset: u64) -> Record<'static> {
    Record::Ack { stream: id(stream), offset }
}

fn window(stream: u32, max_data: u64) -> Record<'static> {
    Record::Window { stream: Some(id(stream)), max_data }
}

fn fin(stream: u32, total: u64) -> Record<'static> {
    Record::Fin { stream: id(stream), total }
}

fn reset(stream: u32, total: u64) -> Record<'static> {
    Record::Reset { stream: id(stream), code: ResetCode::Aborted, total }
}

fn hello(new: bool, progress: Progress) -> Record<'static> {
    Record::Hello { new, progress }
}

/// A stream in the peer's list: what it received, and how it ended its own direction.
type Listed = (u32, u64, Option<End>);

fn progress(next_stream: u32, received: u64, streams: &[Listed]) -> Progress {
    let streams = streams.iter().map(|(number, received, end)| StreamState {
        stream: id(*number),
        received: *received,
        max_data: WINDOW,
        end: *end,
    });
    Progress {
        next_stream: id(next_stream),
        max_data: CHANNEL_WINDOW,
        received,
        streams: streams.collect(),
        more: false,
    }
}

fn more(progress: Progress) -> Progress {
    Progress { more: true, ..progress }
}

/// A greeting of the side under test. What it grants is its own affair.
fn greeting(new: bool, next_stream: u32, received: u64, streams: &[Listed]) -> Value {
    let streams: Vec<_> = streams
        .iter()
        .map(|(stream, received, end)| {
            let (end, total) = match end {
                None => (0, 0),
                Some(End::Fin(total)) => (1, *total),
                Some(End::Reset(total)) => (2, *total),
            };
            json!({ "stream": stream, "received": received, "end": end, "total": total })
        })
        .collect();
    json!({ "new": new, "next_stream": next_stream, "received": received, "streams": streams })
}

fn said(stream: u32, from: u64, bytes: &str, fin: Option<u64>) -> Value {
    json!({ "stream": stream, "from": from, "bytes": hex(bytes), "fin": fin })
}

fn said_with_open(stream: u32, bytes: &str, fin: Option<u64>) -> Value {
    json!({ "stream": stream, "purpose": 0, "from": 0, "bytes": hex(bytes), "fin": fin })
}

fn said_reset(stream: u32, total: u64) -> Value {
    json!({ "stream": stream, "reset": total })
}

fn on_one_tunnel(file: &mut File) {
    let fin_is_read = || json!("fin");
    Script::exposer()
        .says(greeting(false, 2, 0, &[]), &[])
        .gets_open(2)
        .gets_data(2, 0, "hello ")
        .gets_data(2, 6, "world")
        .gets(&fin(2, 11))
        .reads(2, "hello world", fin_is_read())
        .valid(file, "bytes and their end");
    Script::exposer()
        .gets_open(2)
        .gets_data(2, 0, "hello")
        .gets_data(2, 0, "hello")
        .gets_data(2, 3, "lo world")
        .gets(&fin(2, 11))
        .gets(&fin(2, 11))
        .reads(2, "hello world", fin_is_read())
        .valid(file, "what is there already is skipped");
    Script::exposer()
        .gets_open(6)
        .gets_data(6, 0, "hello")
        .reads(6, "hello", Value::Null)
        .valid(file, "numbers of streams are skipped");
    Script::exposer()
        .gets_open(2)
        .gets_zeros(2, WINDOW)
        .gets(&fin(2, WINDOW))
        .valid(file, "a whole window, then the end");
    Script::exposer()
        .gets_open(2)
        .writes(2, "0123456789")
        .says(greeting(false, 2, 0, &[]), &[said(2, 0, "0123456789", None)])
        .gets(&ack(2, 6))
        .gets(&ack(2, 4))
        .gets(&window(2, 10))
        .writes(2, "abc")
        .says(Value::Null, &[said(2, 10, "abc", None)])
        .valid(file, "a lower ACK or WINDOW than before is ignored");
    Script::exposer()
        .gets_open(2)
        .gets_data(2, 0, "hello")
        .gets(&reset(2, 9))
        .reads(2, "", json!({ "reset": 0 }))
        .says(greeting(false, 2, 0, &[]), &[said_reset(2, 0)])
        .gets(&ack(2, 0))
        .gets(&window(2, WINDOW + 1))
        .valid(file, "RESET is answered by RESET, and drops what was not read");
}

fn on_the_next_tunnel(file: &mut File) {
    let again = |next, received, listed: &[Listed]| hello(false, progress(next, received, listed));
    Script::new("exposer")
        .tunnel()
        .gets(&again(4, 0, &[(2, 0, None)]))
        .step(json!({ "says": { "close": CloseCode::Lost.number() } }))
        .valid(file, "a channel that the exposer does not know is not carried on");
    Script::exposer()
        .lost()
        .tunnel()
        .gets(&hello(true, progress(2, 0, &[])))
        .says(greeting(false, 2, 0, &[]), &[])
        .gets_open(2)
        .gets_data(2, 0, "hello")
        .reads(2, "hello", Value::Null)
        .valid(file, "a reacher that got no WELCOME begins again");
    Script::exposer()
        .gets_open(2)
        .gets_data(2, 0, "hello ")
        .lost()
        .tunnel()
        .gets(&again(4, 0, &[(2, 0, None)]))
        .says(greeting(false, 4, 6, &[(2, 6, None)]), &[])
        .gets_data(2, 6, "world")
        .gets(&fin(2, 11))
        .reads(2, "hello world", json!("fin"))
        .valid(file, "the exposer says how far it got");
    Script::exposer()
        .gets_open(2)
        .gets_open(4)
        .lost()
        .tunnel()
        .gets(&hello(false, more(progress(6, 0, &[(2, 0, None)]))))
        .gets(&again(6, 0, &[(4, 0, None)]))
        .says(greeting(false, 6, 0, &[(2, 0, None), (4, 0, None)]), &[])
        .valid(file, "a greeting in two parts");
    let answered = Script::exposer()
        .gets_open(2)
        .writes(2, "0123456789")
        .finishes(2)
        .says(greeting(false, 2, 0, &[]), &[said(2, 0, "0123456789", Some(10))])
        .gets(&ack(2, 4))
        .lost()
        .tunnel();
    let finished = greeting(false, 4, 0, &[(2, 0, Some(End::Fin(10)))]);
    answered
        .clone()
        .gets(&again(4, 7, &[(2, 7, None)]))
        .says(finished.clone(), &[said(2, 7, "789", Some(10))])
        .valid(file, "the exposer sends again what the reacher lacks, and FIN");
    answered
        .clone()
        .gets(&again(4, 10, &[(2, 10, None)]))
        .says(finished.clone(), &[said(2, 10, "", Some(10))])
        .valid(file, "only FIN is missing");
    answered
        .gets(&again(4, 10, &[(2, 11, None)]))
        .says(finished, &[])
        .valid(file, "nothing is missing");

    let asked = Script::reacher()
        .opens(2)
        .writes(2, "0123456789")
        .finishes(2)
        .step(json!({ "tunnel": "carries" }))
        .gets(&ack(2, 4))
        .lost()
        .tunnel();
    let mine = greeting(false, 4, 0, &[(2, 0, Some(End::Fin(10)))]);
    asked
        .welcomed(progress(4, 6, &[(2, 6, None)]))
        .says(mine.clone(), &[said(2, 6, "6789", Some(10))])
        .valid(file, "the reacher sends again what the exposer lacks, and FIN");
    let unheard = Script::reacher()
        .opens(2)
        .writes(2, "0123456789")
        .finishes(2)
        .step(json!({ "tunnel": "carries" }))
        .lost();
    unheard
        .clone()
        .tunnel()
        .welcomed(progress(2, 0, &[]))
        .says(mine, &[said_with_open(2, "0123456789", Some(10))])
        .valid(file, "a stream that the exposer never heard of is opened again");
    unheard
        .clone()
        .resets(2)
        .tunnel()
        .welcomed(progress(2, 0, &[]))
        .opens(4)
        .writes(4, "next")
        .says(
            greeting(false, 4, 0, &[(2, 0, Some(End::Reset(10)))]),
            &[said_with_open(4, "next", None)],
        )
        .valid(file, "a stream that was reset before the exposer heard of it is never opened");
    unheard
        .resets(2)
        .tunnel()
        .welcomed(progress(4, 10, &[(2, 11, None)]))
        .says(greeting(false, 4, 0, &[(2, 0, Some(End::Reset(10)))]), &[said_reset(2, 10)])
        .valid(file, "RESET is said again");
    let talked = Script::reacher()
        .opens(2)
        .writes(2, "ask")
        .finishes(2)
        .step(json!({ "tunnel": "carries" }))
        .gets_data(2, 0, "answer");
    talked
        .clone()
        .gets(&fin(2, 6))
        .lost()
        .tunnel()
        .welcomed(progress(4, 3, &[]))
        .reads(2, "answer", json!("fin"))
        .valid(file, "a stream that the exposer is done with ended well, if all of it came");
    talked
        .clone()
        .lost()
        .tunnel()
        .welcomed(progress(4, 3, &[]))
        .reads(2, "", json!({ "reset": ResetCode::Lost.number() }))
        .valid(file, "a stream that the exposer is done with is lost, if not all of it came");
    talked
        .lost()
        .tunnel()
        .welcomed(progress(4, 3, &[(2, 4, Some(End::Reset(6)))]))
        .reads(2, "", json!({ "reset": 0 }))
        .says(greeting(false, 4, 6, &[(2, 6, Some(End::Fin(3)))]), &[said_reset(2, 3)])
        .valid(file, "a RESET in the list is one");
}

/// Records that belong to the other side, or to another moment.
fn out_of_turn(file: &mut File) {
    let empty = || progress(2, 0, &[]);
    let of_streams: [(&str, Record<'static>); 7] = [
        ("OPENED", Record::Opened(id(2))),
        ("DATA", data(2, 0, "x")),
        ("ACK", ack(2, 0)),
        ("WINDOW", window(2, WINDOW)),
        ("FIN", fin(2, 0)),
        ("RESET", reset(2, 0)),
        ("OPEN", open(2)),
    ];
    let others: [(&str, Record<'static>); 3] = [
        ("WINDOW of the channel", Record::Window { stream: None, max_data: CHANNEL_WINDOW }),
        ("PING", Record::Ping(1)),
        ("PONG", Record::Pong(1)),
    ];
    let greetings: [(&str, Record<'static>); 3] = [
        ("HELLO", hello(true, empty())),
        ("READY", Record::Ready),
        ("WELCOME", Record::Welcome(empty())),
    ];
    let early = "a record before the greeting";
    for (name, record) in greetings.iter().chain(&of_streams).chain(&others) {
        let begun = |side| Script::new(side).tunnel();
        if *name != "HELLO" {
            begun("exposer").gets(record).invalid(file, &format!("{name} before HELLO"), early);
        }
        if *name != "READY" {
            begun("reacher").gets(record).invalid(file, &format!("{name} before READY"), early);
        }
        if *name != "WELCOME" {
            let ready = begun("reacher").gets(&Record::Ready);
            ready.gets(record).invalid(file, &format!("{name} before WELCOME"), early);
        }
    }
    let late = "trust entries after the greeting";
    let again: [(&str, Record<'static>, &str); 6] = [
        ("HELLO", hello(true, empty()), "a second greeting"),
        ("HELLO that resumes", hello(false, empty()), "a second greeting"),
        ("READY", Record::Ready, "a second greeting"),
        ("WELCOME", Record::Welcome(empty()), "a second greeting"),
        ("TRUST_GET", Record::TrustGet(Vec::new()), late),
        ("TRUST", Record::Trust { more: false, entries: &[] }, late),
    ];
    for (name, record, reason) in &again {
        for (side, greeted) in [("exposer", Script::exposer()), ("reacher", Script::reacher())] {
            let name = format!("{name} at the {side}, after the greeting");
            greeted.gets(record).invalid(file, &name, reason);
        }
    }
    let unopened = "a stream that was never opened";
    for (name, record) in &of_streams {
        let (at_exposer, at_reacher) = match *name {
            "OPENED" => ("a stream opened by the wrong side", "a stream opened by the wrong side"),
            "OPEN" => continue,
            _ => (unopened, unopened),
        };
        let name = |side| format!("{name} at the {side}, of a stream that was never opened");
        Script::exposer().gets(record).invalid(file, &name("exposer"), at_exposer);
        Script::reacher().gets(record).invalid(file, &name("reacher"), at_reacher);
    }
    Script::exposer().gets_open(2).gets(&Record::Opened(id(2))).invalid(
        file,
        "OPENED by the reacher",
        "a stream opened by the wrong side",
    );
    let turn = "a stream opened out of turn";
    Script::reacher().gets_open(2).invalid(file, "OPEN by the exposer", turn);
    Script::exposer().gets_open(2).gets_open(2).invalid(file, "OPEN again", turn);
    Script::exposer().gets_open(4).gets_open(2).invalid(file, "OPEN of a lower number", turn);
}

fn bytes_that_must_not_be(file: &mut File) {
    let opened = || Script::exposer().gets_open(2);
    let begun = || opened().gets_data(2, 0, "hello");
    begun().gets_data(2, 6, "world").invalid(file, "DATA after a gap", "gap in a stream");
    begun().gets(&fin(2, 6)).invalid(file, "FIN before the last byte", "FIN before the last byte");
    let below = "final size below what was received";
    begun().gets(&fin(2, 4)).invalid(file, "FIN below what came", below);
    begun().gets(&reset(2, 4)).invalid(file, "RESET below what came", below);
    let ended = || begun().gets(&fin(2, 5));
    let beyond_end = "bytes beyond the stream's end";
    ended().gets_data(2, 5, "x").invalid(file, "DATA after FIN", beyond_end);
    ended().gets_data(2, 0, "hello world").invalid(file, "DATA across FIN", beyond_end);
    let two = "two final sizes of one stream";
    ended().gets(&fin(2, 6)).invalid(file, "FIN with another total", two);
    ended().gets(&reset(2, 6)).invalid(file, "RESET with another total than FIN", two);
    opened().gets_zeros(2, WINDOW).gets_data(2, WINDOW, "x").invalid(
        file,
        "DATA beyond the window",
        "bytes beyond the stream's credit",
    );
    let far = "final size beyond the stream's credit";
    opened().gets(&reset(2, WINDOW + 1)).invalid(file, "RESET beyond the window", far);
    opened().gets(&reset(2, u64::MAX)).invalid(file, "RESET of the largest total", far);
    opened().gets(&fin(2, WINDOW + 1)).invalid(file, "FIN beyond the window", far);
    let mut full = Script::exposer();
    let streams = (1..=FULL_STREAMS).map(|number| u32::try_from(2 * number).expect("few"));
    for stream in streams {
        full = full.gets_open(stream).gets_zeros(stream, WINDOW);
    }
    let last = u32::try_from(2 * FULL_STREAMS + 2).expect("few");
    full.gets_open(last).gets_data(last, 0, "x").invalid(
        file,
        "DATA beyond the credit of the channel",
        "bytes beyond the channel's credit",
    );
    let more_than_sent = "acknowledged more than was sent";
    opened().gets(&ack(2, 1)).invalid(file, "ACK of bytes that were never sent", more_than_sent);
    let wrote = || opened().writes(2, "abc").step(json!({ "tunnel": "carries" }));
    wrote().gets(&ack(2, 4)).invalid(file, "ACK of a FIN that was never sent", more_than_sent);
    let finished = || opened().writes(2, "abc").finishes(2).step(json!({ "tunnel": "carries" }));
    finished().gets(&ack(2, 5)).invalid(file, "ACK of more than FIN", more_than_sent);
}

fn lists_that_must_not_be(file: &mut File) {
    let order = "a list of streams that makes no sense";
    let two = || Script::exposer().gets_open(2).gets_open(4).lost().tunnel();
    for (name, first, second) in
        [("HELLO in parts that descend", 4, 2), ("HELLO in parts that name a stream twice", 4, 4)]
    {
        two()
            .gets(&hello(false, more(progress(6, 0, &[(first, 0, None)]))))
            .gets(&hello(false, progress(6, 0, &[(second, 0, None)])))
            .invalid(file, name, order);
    }
    let reached = || {
        let opened = Script::reacher().opens(2).writes(2, "0123456789");
        opened.step(json!({ "tunnel": "carries" })).gets(&ack(2, 4)).lost().tunnel()
    };
    reached()
        .gets(&Record::Ready)
        .gets(&Record::Welcome(more(progress(4, 0, &[(2, 4, None)]))))
        .gets(&Record::Welcome(progress(4, 0, &[(2, 4, None)])))
        .invalid(file, "WELCOME in parts that name a stream twice", order);
    let exposed = || {
        let opened = Script::exposer().gets_open(2).writes(2, "0123456789");
        opened.step(json!({ "tunnel": "carries" })).gets(&ack(2, 4)).lost().tunnel()
    };
    // What the peer's list says, and why it must not: next stream, received in all, received of stream 2.
    let lacking = "bytes are missing that were acknowledged";
    let cases: [(&str, (u64, u64), &str); 4] = [
        ("less than was acknowledged", (3, 3), lacking),
        ("more than was sent", (11, 11), "acknowledged more than was sent"),
        ("a FIN that was never sent", (10, 11), "acknowledged more than was sent"),
        ("more on the channel than was sent", (11, 10), "received more than was sent"),
    ];
    for (what, (received, of_stream), reason) in cases {
        let listed = progress(4, received, &[(2, of_stream, None)]);
        exposed().gets(&hello(false, listed.clone())).invalid(
            file,
            &format!("HELLO that received {what}"),
            reason,
        );
        reached().gets(&Record::Ready).gets(&Record::Welcome(listed)).invalid(
            file,
            &format!("WELCOME that received {what}"),
            reason,
        );
    }
    exposed().gets(&hello(false, progress(2, 0, &[]))).invalid(
        file,
        "HELLO of a reacher that opened less than it did",
        "a stream that its opener does not know",
    );
    reached().welcomed(progress(6, 10, &[(2, 10, None)])).invalid(
        file,
        "WELCOME of an exposer that knows more streams than there are",
        "streams that were never opened",
    );
    reached().welcomed(progress(2, 0, &[])).invalid(
        file,
        "WELCOME of an exposer that forgot a stream which it acknowledged",
        lacking,
    );
    let reset_list = |total| progress(4, 10, &[(2, 10, Some(End::Reset(total)))]);
    let heard = || {
        let opened = Script::reacher().opens(2).writes(2, "0123456789");
        let carried = opened.step(json!({ "tunnel": "carries" }));
        carried.gets_data(2, 0, "hello").lost().tunnel()
    };
    heard().welcomed(reset_list(4)).invalid(
        file,
        "WELCOME with a RESET below what came",
        "final size below what was received",
    );
    heard().welcomed(reset_list(WINDOW + 1)).invalid(
        file,
        "WELCOME with a RESET beyond the window",
        "final size beyond the stream's credit",
    );
}
