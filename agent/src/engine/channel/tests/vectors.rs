//! `spec/vectors/channels.json`, through the state machine.

use serde_json::{Value, json};

use super::*;

/// One side of a channel, and the peer that the vectors are.
struct Player {
    channel: Channel,
    now: Instant,
    said: Said,
    /// Bytes of each stream that came, for the zeros that follow them.
    fed: BTreeMap<u32, u64>,
}

/// What was said since it was last asked.
#[derive(Default)]
struct Said {
    greeting: Value,
    streams: BTreeMap<u32, Value>,
    close: Option<u16>,
}

fn number(value: &Value) -> u32 {
    value.as_u64().and_then(|number| u32::try_from(number).ok()).expect("a number")
}

fn stream(value: &Value) -> StreamId {
    StreamId::new(number(value)).expect("a stream")
}

fn raw(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().expect("hex")).expect("hex")
}

fn greeting(new: bool, progress: &Progress) -> Value {
    let state = |state: &StreamState| {
        let (end, total) = match state.end {
            None => (0, 0),
            Some(End::Fin(total)) => (1, total),
            Some(End::Reset(total)) => (2, total),
        };
        let (stream, received) = (state.stream.number(), state.received);
        json!({ "stream": stream, "received": received, "end": end, "total": total })
    };
    json!({
        "new": new,
        "next_stream": progress.next_stream.number(),
        "received": progress.received,
        "streams": progress.streams.iter().map(state).collect::<Vec<_>>(),
    })
}

impl Player {
    fn new(side: &Value) -> Self {
        let side = if side == "reacher" { Side::Reacher } else { Side::Exposer };
        let now = Instant::now();
        let channel = Channel::new(side, now, Duration::ZERO);
        Self { channel, now, said: Said::default(), fed: BTreeMap::new() }
    }

    fn gets(&mut self, record: &[u8]) {
        self.channel.handle_record(self.now, &Bytes::copy_from_slice(record));
    }

    /// Takes everything that is due.
    fn carry(&mut self) {
        let mut record = Vec::new();
        while self.channel.poll_transmit(self.now, &mut record) {
            self.said.hear(&Record::decode(&record).expect("our own"));
            record.clear();
        }
    }

    fn step(&mut self, step: &Value) {
        let (kind, value) = step.as_object().and_then(|step| step.iter().next()).expect("a step");
        match (kind.as_str(), value) {
            ("tunnel", Value::String(what)) if what == "new" => {
                self.channel.attach(self.now);
                self.said = Said::default();
            }
            ("tunnel", Value::String(what)) if what == "lost" => self.channel.detach(),
            ("tunnel", _) => {
                self.carry();
                self.said = Said::default();
            }
            ("gets", record) => {
                let record = raw(record);
                if let Ok(Record::Data { stream, offset, bytes }) = Record::decode(&record) {
                    self.fed.insert(stream.number(), offset + bytes.len() as u64);
                }
                self.gets(&record);
            }
            ("gets_zeros", zeros) => {
                let stream = stream(&zeros["stream"]);
                let mut left = zeros["count"].as_u64().expect("a number");
                while left > 0 {
                    let length = usize::try_from(left).expect("few").min(MAX_DATA_BYTES);
                    let offset = self.fed.entry(stream.number()).or_default();
                    let mut record = Vec::new();
                    Record::Data { stream, offset: *offset, bytes: &vec![0; length] }
                        .encode(&mut record);
                    *offset += length as u64;
                    left -= length as u64;
                    self.gets(&record);
                }
            }
            ("opens", id) => assert_eq!(self.channel.open(Purpose::Target), Ok(stream(id))),
            ("writes", write) => {
                let bytes = raw(&write["bytes"]);
                let taken = self.channel.write(stream(&write["stream"]), &bytes[..]);
                assert_eq!(taken, Ok(bytes.len()));
            }
            ("finishes", id) => self.channel.finish(stream(id)).expect("it is open"),
            ("resets", id) => self.channel.reset(stream(id), ResetCode::Aborted),
            ("reads", read) => assert_eq!(self.read(stream(&read["stream"])), reads(read)),
            ("says", expected) => {
                self.carry();
                let said = std::mem::take(&mut self.said);
                match expected.get("close") {
                    Some(code) => assert_eq!(said.close.map(u32::from), Some(number(code))),
                    None => {
                        assert_eq!(said.greeting, expected["greeting"]);
                        let streams: Vec<_> = said.streams.into_values().collect();
                        assert_eq!(Value::from(streams), expected["streams"]);
                    }
                }
            }
            _ => panic!("a step of no known kind: {step}"),
        }
    }

    /// Everything that waits, and how the stream ended.
    fn read(&mut self, stream: StreamId) -> (Vec<u8>, Value) {
        let mut all = Vec::new();
        loop {
            match self.channel.read(stream, usize::MAX) {
                Ok(Read::Bytes(bytes)) => all.extend_from_slice(&bytes),
                Ok(Read::Finished) => return (all, json!("fin")),
                Ok(Read::Blocked) => return (all, Value::Null),
                Err(StreamError::Reset(code)) => return (all, json!({ "reset": code.number() })),
                Err(StreamError::Closed) => panic!("{stream:?} is closed"),
            }
        }
    }

    /// Why the channel is closed, if it is.
    fn closed(&mut self) -> Option<CloseReason> {
        std::iter::from_fn(|| self.channel.poll_event())
            .find_map(|event| if let Event::Closed(reason) = event { Some(reason) } else { None })
    }
}

fn reads(read: &Value) -> (Vec<u8>, Value) {
    (raw(&read["bytes"]), read["end"].clone())
}

impl Said {
    fn hear(&mut self, record: &Record<'_>) {
        match record {
            Record::Hello { new, progress } => self.greeting = greeting(*new, progress),
            Record::Welcome(progress) => self.greeting = greeting(false, progress),
            Record::Open { stream, purpose } => {
                self.of(*stream)["purpose"] = purpose.number().into();
            }
            Record::Data { stream, offset, bytes } => {
                let said = self.of(*stream);
                if said["from"].is_null() {
                    said["from"] = json!(offset);
                }
                let before = said["bytes"].as_str().unwrap_or_default();
                said["bytes"] = format!("{before}{}", hex::encode(bytes)).into();
                said["fin"] = Value::Null;
            }
            Record::Fin { stream, total } => {
                let said = self.of(*stream);
                if said["from"].is_null() {
                    (said["from"], said["bytes"]) = (json!(total), "".into());
                }
                said["fin"] = json!(total);
            }
            Record::Reset { stream, total, .. } => self.of(*stream)["reset"] = json!(total),
            Record::ChannelClose(code) => self.close = Some(code.number()),
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

    fn of(&mut self, stream: StreamId) -> &mut Value {
        let number = stream.number();
        self.streams.entry(number).or_insert_with(|| json!({ "stream": number }))
    }
}

#[test]
fn vectors_come_to_what_they_say() {
    let file = include_str!("../../../../../spec/vectors/channels.json");
    let file: Value = serde_json::from_str(file).expect("JSON");
    for case in file["cases"].as_array().expect("cases") {
        let mut player = Player::new(&case["side"]);
        let steps = case["steps"].as_array().expect("steps");
        let (last, before) = steps.split_last().expect("a step");
        let name = &case["name"];
        println!("{name}");
        let mut closed = None;
        for step in before {
            player.step(step);
            closed = closed.or(player.closed());
            let lost = closed.is_none_or(|reason| reason == CloseReason::Local);
            assert!(lost, "{name}: {step}: {closed:?}");
        }
        player.step(last);
        match closed.or(player.closed()) {
            Some(CloseReason::Violation(ProtocolViolation(why))) => {
                assert_eq!((&case["valid"], &case["reason"]), (&false.into(), &why.into()));
                player.carry();
                assert_eq!(player.said.close, Some(CloseCode::Protocol.number()), "{name}");
            }
            other => {
                assert_eq!(case["valid"], true, "{name}: {other:?}");
                let is_lost = last["says"].get("close").is_some();
                assert_eq!(other, is_lost.then_some(CloseReason::Local), "{name}");
            }
        }
    }
}
