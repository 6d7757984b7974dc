//! Vectors of the channel: records that one side reads, tunnels that are lost meanwhile, and what comes of it. The
//! machine is in the agent, which this program does not see: a test of the agent holds it against these cases, and
//! the reasons are written here.

use connect_spec::record::{
    CloseCode, End, Progress, Purpose, Record, RekeyTry, ResetCode, StreamId, StreamState,
};
use serde_json::{Value, json};

use super::{File, hex, merged};

const WINDOW: u64 = 262_144;
const CREDIT: u64 = 16 << 20;

fn stream(number: u32) -> StreamId {
    StreamId::new(number).expect("even")
}

fn listed(number: u32, received: u64, end: Option<End>) -> StreamState {
    StreamState { stream: stream(number), received, max_data: WINDOW, end }
}

fn progress(next_stream: u32, received: u64, streams: &[StreamState]) -> Progress {
    let (next_stream, streams) = (stream(next_stream), streams.to_vec());
    Progress { next_stream, max_data: CREDIT, received, streams, more: false }
}

fn begin() -> Record<'static> {
    Record::Hello { new: true, progress: progress(2, 0, &[]) }
}

fn again(next_stream: u32, received: u64, streams: &[StreamState]) -> Record<'static> {
    Record::Hello { new: false, progress: progress(next_stream, received, streams) }
}

fn welcome(next_stream: u32, received: u64, streams: &[StreamState]) -> Record<'static> {
    Record::Welcome(progress(next_stream, received, streams))
}

fn open(number: u32) -> Record<'static> {
    Record::Open { stream: stream(number), purpose: Purpose::Target }
}

fn data(number: u32, offset: u64, bytes: &[u8]) -> Record<'_> {
    Record::Data { stream: stream(number), offset, bytes }
}

fn fin(number: u32, total: u64) -> Record<'static> {
    Record::Fin { stream: stream(number), total }
}

fn ack(number: u32, offset: u64) -> Record<'static> {
    Record::Ack { stream: stream(number), offset }
}

fn reset(number: u32, total: u64) -> Record<'static> {
    Record::Reset { stream: stream(number), code: ResetCode::Aborted, total }
}

/// What happens to one side.
#[derive(Clone)]
struct Story {
    side: &'static str,
    steps: Vec<Value>,
}

impl Story {
    /// The exposer, on its first tunnel.
    fn exposer() -> Self {
        Self { side: "exposer", steps: Vec::new() }.tunnel()
    }

    /// The exposer after the greeting, with a stream 2 that was opened.
    fn serving() -> Self {
        Self::exposer().reads(&begin()).reads(&open(2))
    }

    /// The reacher, with a stream 2 that its application opened and wrote to, on its first tunnel.
    fn asking() -> Self {
        Self { side: "reacher", steps: Vec::new() }.opens(2).writes(2, b"ask").tunnel()
    }

    /// The reacher after the greeting.
    fn asked() -> Self {
        Self::asking().reads(&Record::Ready).reads(&welcome(2, 0, &[]))
    }

    fn step(mut self, step: Value) -> Self {
        self.steps.push(step);
        self
    }

    fn tunnel(self) -> Self {
        self.step(json!({ "tunnel": true }))
    }

    fn reads(self, record: &Record<'_>) -> Self {
        let mut plain = Vec::new();
        record.encode(&mut plain);
        self.step(json!({ "read": hex(plain) }))
    }

    fn opens(self, number: u32) -> Self {
        self.step(json!({ "open": number }))
    }

    fn writes(self, number: u32, bytes: &[u8]) -> Self {
        self.step(json!({ "write": number, "bytes": hex(bytes) }))
    }

    fn finishes(self, number: u32) -> Self {
        self.step(json!({ "finish": number }))
    }

    fn resets(self, number: u32) -> Self {
        self.step(json!({ "reset": number }))
    }

    fn case(&self) -> Value {
        json!({ "side": self.side, "steps": self.steps })
    }
}

/// What is left of a stream for the application: what came, and how it ended.
fn got(number: u32, bytes: &[u8], end: &str) -> Value {
    json!({ "stream": number, "bytes": hex(bytes), "end": end })
}

/// What is said of a stream on the last tunnel.
fn says(number: u32) -> Value {
    json!({ "stream": number, "open": false, "from": null, "bytes": "", "fin": null, "reset": null })
}

fn with(mut value: Value, field: &str, is: impl Into<Value>) -> Value {
    value[field] = is.into();
    value
}

fn sends(number: u32, from: u64, bytes: &[u8]) -> Value {
    with(with(says(number), "from", from), "bytes", hex(bytes))
}

pub(super) fn channels() -> File {
    let mut file = File::new(
        "channels",
        "A channel of `side`, to which the `steps` happen: a `tunnel` begins, and the one before is lost; a record is \
         `read`; the application opens a stream, which gets the number `open`, or writes to one, finishes or resets \
         its own direction. The application takes at once what comes. In a valid case `greeting` is what the last \
         HELLO or WELCOME of this side says but for credits (null: not fixed), `got` what the application got of each \
         stream that it did not reset itself, `sends` \
         what is said of streams on the last tunnel: OPEN, DATA from an offset, FIN and RESET with their totals. In \
         the others the last record ends the channel with CHANNEL_CLOSE(`code`)",
    );
    sound(&mut file);
    of_exposer(&mut file);
    of_reacher(&mut file);
    of_resume(&mut file);
    file
}

fn sound(file: &mut File) {
    let mut valid = |name: &str, story: &Story, greeting: Value, got: &[Value], sends: &[Value]| {
        let outcome = json!({ "greeting": greeting, "got": got, "sends": sends });
        file.valid(name, merged(&[story.case(), outcome]));
    };
    let greeting = |next_stream: u32, received: u64, streams: &[(u32, u64, &str, u64)]| {
        let streams: Vec<_> = streams
            .iter()
            .map(|(number, received, end, total)| {
                json!({ "stream": number, "received": received, "end": end, "total": total })
            })
            .collect();
        json!({ "next_stream": next_stream, "received": received, "streams": streams })
    };
    let first = greeting(2, 0, &[]);

    let story = Story::serving()
        .reads(&data(2, 0, b"hello "))
        .reads(&data(2, 6, b"world"))
        .reads(&fin(2, 11));
    valid("a stream and its end", &story, first.clone(), &[got(2, b"hello world", "fin")], &[]);
    let story = Story::serving()
        .reads(&data(2, 0, b"hello"))
        .reads(&data(2, 3, b"lo wo"))
        .reads(&data(2, 0, b"he"));
    valid("bytes that came before", &story, first.clone(), &[got(2, b"hello wo", "none")], &[]);
    let story = Story::serving().reads(&open(8)).reads(&data(8, 0, b"x"));
    let both = [got(2, b"", "none"), got(8, b"x", "none")];
    valid("numbers that are skipped", &story, first.clone(), &both, &[]);
    let story = Story::serving().writes(2, b"answer").finishes(2);
    let answer = with(sends(2, 0, b"answer"), "fin", 6);
    valid(
        "an answer",
        &story,
        first.clone(),
        &[got(2, b"", "none")],
        std::slice::from_ref(&answer),
    );
    let story = Story::serving().reads(&data(2, 0, b"hello")).reads(&reset(2, 9));
    let told = with(says(2), "reset", 0);
    valid("RESET is answered", &story, first.clone(), &[got(2, b"hello", "reset")], &[told]);
    let unknown = Record::Open { stream: stream(4), purpose: Purpose::Other(9) };
    let story = Story::serving().reads(&unknown);
    let told = with(says(4), "reset", 0);
    valid("a purpose that is not known", &story, first.clone(), &[got(2, b"", "none")], &[told]);

    // From here on, more than one tunnel.
    let story = Story::serving()
        .reads(&data(2, 0, b"hello"))
        .tunnel()
        .reads(&again(4, 0, &[listed(2, 0, None)]))
        .reads(&data(2, 5, b" world"))
        .reads(&fin(2, 11));
    let at = greeting(4, 5, &[(2, 5, "none", 0)]);
    valid("carried on", &story, at, &[got(2, b"hello world", "fin")], &[]);
    let story = Story::serving()
        .reads(&data(2, 0, b"hello"))
        .reads(&fin(2, 5))
        .tunnel()
        .reads(&again(4, 0, &[listed(2, 0, Some(End::Fin(5)))]));
    let at = greeting(4, 5, &[(2, 6, "none", 0)]);
    valid("FIN counts as received", &story, at, &[got(2, b"hello", "fin")], &[]);
    let story = Story::exposer().reads(&begin()).tunnel().reads(&begin()).reads(&open(2));
    valid("a WELCOME that was lost", &story, first.clone(), &[got(2, b"", "none")], &[]);
    let story = Story::serving().writes(2, b"answer").finishes(2).tunnel().reads(&again(
        4,
        2,
        &[listed(2, 2, None)],
    ));
    let at = greeting(4, 0, &[(2, 0, "fin", 6)]);
    let rest = with(sends(2, 2, b"swer"), "fin", 6);
    valid("the rest is sent again", &story, at.clone(), &[got(2, b"", "none")], &[rest]);
    let story = Story::serving().writes(2, b"answer").finishes(2).tunnel().reads(&again(
        4,
        6,
        &[listed(2, 7, None)],
    ));
    valid("nothing is sent again", &story, at, &[got(2, b"", "none")], &[]);
    let story = Story::serving().reads(&data(2, 0, b"hello")).tunnel().reads(&again(
        4,
        0,
        &[listed(2, 0, Some(End::Reset(9)))],
    ));
    // Whether such a stream is listed once more depends on the application, which may not have let go.
    let told = with(says(2), "reset", 0);
    valid("RESET in the list", &story, Value::Null, &[got(2, b"hello", "reset")], &[told]);
    let story = Story::serving().writes(2, b"answer").tunnel().reads(&again(4, 0, &[]));
    valid("a stream that is not listed is lost", &story, Value::Null, &[got(2, b"", "reset")], &[]);
    let mut part = progress(4, 77, &[listed(2, 0, None)]);
    part.more = true;
    let story = Story::serving()
        .reads(&open(4))
        .writes(4, b"answer")
        .tunnel()
        .reads(&Record::Hello { new: false, progress: part })
        .reads(&again(6, 1, &[listed(4, 1, None)]));
    let at = greeting(6, 0, &[(2, 0, "none", 0), (4, 0, "none", 0)]);
    let both = [got(2, b"", "none"), got(4, b"", "none")];
    valid("a list in two parts", &story, at, &both, &[sends(4, 1, b"nswer")]);

    let story = Story::asked();
    let ask = with(sends(2, 0, b"ask"), "open", true);
    valid("a question", &story, first.clone(), &[got(2, b"", "none")], std::slice::from_ref(&ask));
    let story = Story::asked().tunnel().reads(&Record::Ready).reads(&welcome(2, 0, &[]));
    let at = greeting(4, 0, &[(2, 0, "none", 0)]);
    valid("opened again", &story, at.clone(), &[got(2, b"", "none")], &[ask]);
    let story =
        Story::asked().tunnel().reads(&Record::Ready).reads(&welcome(4, 2, &[listed(2, 2, None)]));
    valid("the rest of a question", &story, at, &[got(2, b"", "none")], &[sends(2, 2, b"k")]);
    let story = Story::asked()
        .reads(&data(2, 0, b"answer"))
        .tunnel()
        .reads(&Record::Ready)
        .reads(&welcome(4, 3, &[listed(2, 3, Some(End::Fin(6)))]))
        .reads(&fin(2, 6));
    let at = greeting(4, 6, &[(2, 6, "none", 0)]);
    valid("FIN comes as a record", &story, at, &[got(2, b"answer", "fin")], &[]);
    let story =
        Story::asked().resets(2).tunnel().reads(&Record::Ready).reads(&welcome(2, 0, &[])).opens(4);
    let at = greeting(4, 0, &[(2, 0, "reset", 3)]);
    let other = with(says(4), "open", true);
    valid(
        "one that nobody heard of is forgotten",
        &story,
        at.clone(),
        &[got(4, b"", "none")],
        &[other],
    );
    let story = Story::asked().resets(2).tunnel().reads(&Record::Ready).reads(&welcome(
        4,
        3,
        &[listed(2, 3, None)],
    ));
    let told = with(says(2), "reset", 3);
    valid("RESET is said again", &story, at, &[], &[told]);
}

/// Ends the channel by the last record.
fn violation(file: &mut File, name: &str, reason: &str, story: &Story) {
    refused(file, name, reason, CloseCode::Protocol, story);
}

fn refused(file: &mut File, name: &str, reason: &str, code: CloseCode, story: &Story) {
    let code = json!({ "code": code.number() });
    file.invalid(name, Err::<(), _>(reason), merged(&[story.case(), code]));
}

fn of_exposer(file: &mut File) {
    let before = "a record before the greeting";
    for (name, record) in [
        ("OPEN", open(2)),
        ("DATA", data(2, 0, b"x")),
        ("PING", Record::Ping(1)),
        ("WINDOW", Record::Window { stream: None, max_data: CREDIT }),
        ("READY", Record::Ready),
        ("WELCOME", welcome(2, 0, &[])),
        ("HS1", Record::Hs1 { rekey: RekeyTry { number: 1, attempt: 0 }, message: &[7; 96] }),
    ] {
        violation(file, &format!("{name} before HELLO"), before, &Story::exposer().reads(&record));
    }
    let unknown = Story::exposer().reads(&again(2, 0, &[]));
    refused(
        file,
        "HELLO of a channel that is not known",
        "the channel is not known here",
        CloseCode::Lost,
        &unknown,
    );
    let second = "a second greeting";
    for (name, record) in [
        ("HELLO", begin()),
        ("HELLO that carries on", again(4, 0, &[])),
        ("WELCOME", welcome(4, 0, &[])),
        ("READY", Record::Ready),
    ] {
        violation(
            file,
            &format!("{name} after the greeting"),
            second,
            &Story::serving().reads(&record),
        );
    }
    violation(
        file,
        "TRUST_GET after the greeting",
        "trust entries after the greeting",
        &Story::serving().reads(&Record::TrustGet(Vec::new())),
    );
    let turn = "a stream opened out of turn";
    violation(file, "OPEN twice", turn, &Story::serving().reads(&open(2)));
    violation(
        file,
        "OPEN of a number that was skipped",
        turn,
        &Story::serving().reads(&open(8)).reads(&open(4)),
    );
    let opened = Record::Opened(stream(2));
    violation(
        file,
        "OPENED to the exposer",
        "a stream opened by the wrong side",
        &Story::serving().reads(&opened),
    );
    let never = "a stream that was never opened";
    for (name, record) in [
        ("DATA", data(4, 0, b"x")),
        ("ACK", ack(4, 0)),
        ("FIN", fin(4, 0)),
        ("RESET", reset(4, 0)),
        ("WINDOW", Record::Window { stream: Some(stream(4)), max_data: WINDOW }),
    ] {
        violation(
            file,
            &format!("{name} of a stream that was never opened"),
            never,
            &Story::serving().reads(&record),
        );
    }
    let hello = || Story::serving().reads(&data(2, 0, b"hello"));
    violation(file, "a gap", "gap in a stream", &Story::serving().reads(&data(2, 1, b"x")));
    violation(file, "a gap after bytes", "gap in a stream", &hello().reads(&data(2, 6, b"x")));
    violation(
        file,
        "FIN before the last byte",
        "FIN before the last byte",
        &hello().reads(&fin(2, 6)),
    );
    let sizes = "two final sizes of one stream";
    violation(
        file,
        "FIN below what came",
        "a final size below what came",
        &hello().reads(&fin(2, 4)),
    );
    violation(
        file,
        "a second FIN with another total",
        sizes,
        &hello().reads(&fin(2, 5)).reads(&fin(2, 6)),
    );
    let beyond = "bytes beyond the stream's end";
    violation(file, "DATA after FIN", beyond, &hello().reads(&fin(2, 5)).reads(&data(2, 5, b"x")));
    violation(
        file,
        "RESET after FIN with another total",
        sizes,
        &hello().reads(&fin(2, 5)).reads(&reset(2, 6)),
    );
    violation(
        file,
        "RESET below what came",
        "a final size below what came",
        &hello().reads(&reset(2, 4)),
    );
    let credit = "a final size beyond the stream's credit";
    violation(file, "RESET beyond the window", credit, &hello().reads(&reset(2, WINDOW + 1)));
    let sent = "acknowledged more than was sent";
    violation(file, "ACK of what was not sent", sent, &Story::serving().reads(&ack(2, 1)));
    let answered = || Story::serving().writes(2, b"answer");
    violation(file, "ACK of a FIN that was not sent", sent, &answered().reads(&ack(2, 7)));
    violation(file, "ACK of more than FIN", sent, &answered().finishes(2).reads(&ack(2, 8)));
}

fn of_reacher(file: &mut File) {
    let before = "a record before the greeting";
    for (name, record) in [
        ("WELCOME before READY", welcome(2, 0, &[])),
        ("HELLO to the reacher", begin()),
        ("DATA before READY", data(2, 0, b"x")),
    ] {
        violation(file, name, before, &Story::asking().reads(&record));
    }
    for (name, record) in [
        ("READY twice", Record::Ready),
        ("DATA before WELCOME", data(2, 0, b"x")),
        ("HELLO in place of WELCOME", begin()),
        ("OPENED before WELCOME", Record::Opened(stream(2))),
    ] {
        violation(file, name, before, &Story::asking().reads(&Record::Ready).reads(&record));
    }
    let second = "a second greeting";
    violation(file, "WELCOME twice", second, &Story::asked().reads(&welcome(2, 0, &[])));
    violation(
        file,
        "HELLO to the reacher after the greeting",
        second,
        &Story::asked().reads(&begin()),
    );
    let turn = "a stream opened out of turn";
    violation(file, "OPEN by the exposer", turn, &Story::asked().reads(&open(4)));
    let wrong = "a stream opened by the wrong side";
    violation(
        file,
        "OPENED of what was never opened",
        wrong,
        &Story::asked().reads(&Record::Opened(stream(4))),
    );
    let sent = "acknowledged more than was sent";
    violation(file, "ACK of more than the question", sent, &Story::asked().reads(&ack(2, 4)));
}

fn of_resume(file: &mut File) {
    let mut part = progress(6, 0, &[listed(4, 0, None)]);
    part.more = true;
    let order = Story::serving()
        .reads(&open(4))
        .tunnel()
        .reads(&Record::Hello { new: false, progress: part })
        .reads(&again(6, 0, &[listed(2, 0, None)]));
    let makes_no_sense = "a list of streams that makes no sense";
    violation(file, "parts of a list that do not ascend", makes_no_sense, &order);
    let within = Story::serving().tunnel().reads(&open(4));
    violation(file, "OPEN before the next greeting", "a record before the greeting", &within);
    let forgotten = Story::serving().tunnel().reads(&again(2, 0, &[]));
    let unknown = "a stream that its opener does not know";
    violation(file, "HELLO that does not know a stream", unknown, &forgotten);
    let anew = Story::serving().tunnel().reads(&begin());
    violation(file, "new, after a stream was opened", unknown, &anew);
    let answered = || Story::serving().writes(2, b"answer");
    let less = answered().reads(&ack(2, 4)).tunnel().reads(&again(4, 3, &[listed(2, 3, None)]));
    let missing = "bytes are missing that were acknowledged";
    violation(file, "less received than acknowledged", missing, &less);
    let more = answered().tunnel().reads(&again(4, 6, &[listed(2, 8, None)]));
    violation(file, "more received than sent", "acknowledged more than was sent", &more);
    let fin = answered().tunnel().reads(&again(4, 6, &[listed(2, 7, None)]));
    violation(file, "FIN received that was not sent", "acknowledged more than was sent", &fin);
    let channel = answered().tunnel().reads(&again(4, 7, &[listed(2, 6, None)]));
    violation(
        file,
        "more received on the channel than sent",
        "received more than was sent",
        &channel,
    );
    let total = Story::serving().reads(&data(2, 0, b"hello")).tunnel().reads(&again(
        4,
        0,
        &[listed(2, 0, Some(End::Reset(4)))],
    ));
    let below = "a final size below what came";
    violation(file, "RESET in the list, below what came", below, &total);
    let lost = Story::asked().tunnel().reads(&Record::Ready);
    violation(
        file,
        "WELCOME of streams that were never opened",
        "streams that were never opened",
        &lost.clone().reads(&welcome(6, 0, &[])),
    );
    let early = lost.clone().reads(&data(2, 0, b"x"));
    violation(file, "DATA before the next WELCOME", "a record before the greeting", &early);
    let more = lost.clone().reads(&welcome(4, 3, &[listed(2, 5, None)]));
    violation(
        file,
        "WELCOME that received more than was sent",
        "acknowledged more than was sent",
        &more,
    );
    let credit = lost.reads(&welcome(2, 1, &[]));
    violation(
        file,
        "WELCOME that counts bytes of no stream",
        "received more than was sent",
        &credit,
    );
}
