//! The machine held against `spec/vectors/channels.json`, which is written from PROTOCOL.md alone.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

/// One side, and what can be seen of it.
struct Seen {
    channel: Channel,
    now: Instant,
    /// The last HELLO or WELCOME, of one part.
    greeting: Value,
    /// What is said of streams since the last tunnel began.
    sends: BTreeMap<u32, Value>,
    /// What the application got.
    got: BTreeMap<u32, Value>,
    closed_with: Option<CloseCode>,
}

fn stream(value: &Value) -> StreamId {
    StreamId::new(u32::try_from(value.as_u64().expect("a number")).expect("u32")).expect("even")
}

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().expect("hex")).expect("hex")
}

/// Puts `more` behind the bytes that are there.
fn append(value: &mut Value, more: &[u8]) {
    let before = value["bytes"].as_str().expect("hex").to_owned();
    value["bytes"] = (before + &hex::encode(more)).into();
}

impl Seen {
    fn new(side: Side) -> Self {
        let now = Instant::now();
        Self {
            channel: Channel::new(side, now, Duration::ZERO),
            now,
            greeting: Value::Null,
            sends: BTreeMap::new(),
            got: BTreeMap::new(),
            closed_with: None,
        }
    }

    fn step(&mut self, step: &Value) {
        let channel = &mut self.channel;
        if step["tunnel"] == true {
            channel.detach();
            channel.attach(self.now);
            self.sends.clear();
        } else if step["read"].is_string() {
            channel.handle_record(self.now, &bytes(&step["read"]).into());
        } else if step["open"].is_number() {
            let opened = channel.open(Purpose::Target).expect("the channel is open");
            assert_eq!(opened, stream(&step["open"]));
            self.offer(opened);
        } else if step["write"].is_number() {
            let bytes = bytes(&step["bytes"]);
            let written = channel.write(stream(&step["write"]), bytes.as_slice());
            assert_eq!(written.ok(), Some(bytes.len()));
        } else if step["finish"].is_number() {
            channel.finish(stream(&step["finish"])).expect("the stream is open");
        } else {
            let reset = stream(&step["reset"]);
            channel.reset(reset, ResetCode::Aborted);
            channel.release(reset);
            self.got.remove(&reset.number());
        }
        self.settle();
    }

    /// The application has a stream.
    fn offer(&mut self, id: StreamId) {
        let nothing = json!({ "stream": id.number(), "bytes": "", "end": "none" });
        self.got.insert(id.number(), nothing);
    }

    /// The application takes what there is, and whatever is to be said is said.
    fn settle(&mut self) {
        while let Some(event) = self.channel.poll_event() {
            if let Event::Incoming(id, _) = event {
                self.offer(id);
            }
        }
        for (number, got) in &mut self.got {
            let id = StreamId::new(*number).expect("even");
            while got["end"] == "none" {
                match self.channel.read(id, usize::MAX) {
                    Ok(Read::Bytes(bytes)) => append(got, &bytes),
                    Ok(Read::Finished) => got["end"] = "fin".into(),
                    Ok(Read::Blocked) => break,
                    Err(_) => {
                        got["end"] = "reset".into();
                        self.channel.release(id);
                    }
                }
            }
        }
        let mut plain = Vec::new();
        while self.channel.poll_transmit(self.now, &mut plain) {
            self.note(&Record::decode(&plain).expect("just encoded"));
            plain.clear();
        }
    }

    /// What is said of a stream.
    fn said(&mut self, id: StreamId) -> &mut Value {
        let nothing = json!({
            "stream": id.number(), "open": false, "from": null, "bytes": "", "fin": null, "reset": null,
        });
        self.sends.entry(id.number()).or_insert(nothing)
    }

    fn note(&mut self, record: &Record<'_>) {
        match record {
            Record::Hello { progress, .. } | Record::Welcome(progress) => {
                self.greeting = greeting(progress);
            }
            Record::Open { stream, .. } => self.said(*stream)["open"] = true.into(),
            Record::Data { stream, offset, bytes } => {
                let said = self.said(*stream);
                if said["from"].is_null() {
                    said["from"] = (*offset).into();
                }
                append(said, bytes);
            }
            Record::Fin { stream, total } => self.said(*stream)["fin"] = (*total).into(),
            Record::Reset { stream, total, .. } => self.said(*stream)["reset"] = (*total).into(),
            Record::ChannelClose(code) => self.closed_with = Some(*code),
            Record::Ready
            | Record::TrustGet(_)
            | Record::Trust { .. }
            | Record::Opened(_)
            | Record::Ack { .. }
            | Record::Window { .. }
            | Record::Ping(_)
            | Record::Pong(_)
            | Record::HsWant(_)
            | Record::Hs1 { .. }
            | Record::Hs2 { .. }
            | Record::Switch(_)
            | Record::TunnelClose(_) => {}
        }
    }
}

fn greeting(progress: &Progress) -> Value {
    let listed = progress.streams.iter().map(|state| {
        let (end, total) = match state.end {
            None => ("none", 0),
            Some(End::Fin(total)) => ("fin", total),
            Some(End::Reset(total)) => ("reset", total),
        };
        json!({ "stream": state.stream.number(), "received": state.received, "end": end, "total": total })
    });
    json!({
        "next_stream": progress.next_stream.number(),
        "received": progress.received,
        "streams": listed.collect::<Vec<_>>(),
    })
}

#[test]
fn channels_do_what_the_vectors_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/vectors/channels.json");
    let text = std::fs::read_to_string(path).expect("the vectors");
    let file: Value = serde_json::from_str(&text).expect("JSON");
    let cases = file["cases"].as_array().expect("cases");
    assert!(!cases.is_empty());
    for case in cases {
        let name = &case["name"];
        let side = if case["side"] == "exposer" { Side::Exposer } else { Side::Reacher };
        let mut seen = Seen::new(side);
        for step in case["steps"].as_array().expect("steps") {
            assert_eq!(seen.closed_with, None, "{name}: before {step}");
            seen.step(step);
        }
        if case["valid"] == true {
            assert_eq!(seen.closed_with, None, "{name}");
            if !case["greeting"].is_null() {
                assert_eq!(seen.greeting, case["greeting"], "{name}");
            }
            let list = |map: BTreeMap<u32, Value>| map.into_values().collect::<Vec<_>>();
            assert_eq!(Value::from(list(seen.got)), case["got"], "{name}");
            assert_eq!(Value::from(list(seen.sends)), case["sends"], "{name}");
        } else {
            let code = seen.closed_with.map(CloseCode::number);
            assert_eq!(code.map(Value::from).as_ref(), Some(&case["code"]), "{name}");
        }
    }
}
