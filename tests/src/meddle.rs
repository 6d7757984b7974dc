//! What a hub, or somebody on the way to it, can do to messages without understanding them: rules that say
//! which message is dropped, delayed, doubled, swapped, sent back, cut, bent or replaced by another.
//!
//! A rule is `PLACE[#WHICH]:DEED`. `connect-hostile-hub --meddle` takes rules from anybody, and the tests
//! sweep over them.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::anyhow;
use connect_spec::{
    control::{self, FromAgent, FromHub},
    encoding::{decode_base64, encode_base64},
};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::hostile_relay::{Passing, Verdict};

/// On which way a message is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// On a control socket, to the hub; of this `type`, if one is named, or this `do` of a request.
    ToHub(Option<String>),
    /// On a control socket, to the agent.
    ToAgent(Option<String>),
    /// On a data socket, from the agent behind this relay.
    Up,
    /// On a data socket, to it.
    Down,
}

/// Which of the messages that are there, counted from 0: on data sockets for each socket and direction, on
/// control sockets over all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Which {
    first: usize,
    last: usize,
}

/// What is done to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Drop,
    Twice,
    Swap,
    Reflect,
    Delay(Duration),
    /// The bit of the packet, or of the text.
    Flip(usize),
    /// To so many bytes.
    Truncate(usize),
    /// By the packet of this number of the last other socket, in the same direction.
    Splice(usize),
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    text: String,
    place: Place,
    which: Which,
    deed: Deed,
}

/// How rules are written, for `--help`.
pub const GRAMMAR: &str = "\
A rule is PLACE[#WHICH]:DEED, such as `up#3:flip=17` or `to-agent/incoming_tunnel:twice`.
  PLACE  up, down         packets of data sockets, from the agent and to it
         to-hub, to-agent messages of control sockets; with /TYPE only those, such as
                          /accept_tunnel, /welcome, or of a request /open_tunnel
  WHICH  3, 3-5, 3-       which of them, counted from 0; all when left out. Packets are
                          counted for each socket, messages over all of them
  DEED   drop, twice, swap (with the next), reflect (back to the sender), delay=MILLISECONDS,
         flip=BIT, truncate=BYTES, splice=N (packets only: in its place packet N of another
         socket, if one passed)";

impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let wrong = |why| anyhow!("`{text}` is no rule: {why}");
        let (at, deed) = text.rsplit_once(':').ok_or_else(|| wrong("it has no `:DEED`"))?;
        let (place, which) = at.split_once('#').unwrap_or((at, "0-"));
        let (place, kind) = match place.split_once('/') {
            Some((place, kind)) => (place, Some(kind.to_owned())),
            None => (place, None),
        };
        let place = match (place, kind) {
            ("to-hub", kind) => Place::ToHub(kind),
            ("to-agent", kind) => Place::ToAgent(kind),
            ("up", None) => Place::Up,
            ("down", None) => Place::Down,
            _ => return Err(wrong("the place is up, down, to-hub[/TYPE] or to-agent[/TYPE]")),
        };
        let number = |digits: &str| digits.parse::<usize>().ok();
        let which = match which.split_once('-') {
            None => number(which).map(|only| Which { first: only, last: only }),
            Some((first, "")) => number(first).map(|first| Which { first, last: usize::MAX }),
            Some((first, last)) => {
                number(first).zip(number(last)).map(|(first, last)| Which { first, last })
            }
        };
        let which = which.ok_or_else(|| wrong("which is a number, or `3-5`, or `3-`"))?;
        let (name, value) = deed.split_once('=').unwrap_or((deed, ""));
        let deed = match (name, number(value)) {
            ("drop", None) => Deed::Drop,
            ("twice", None) => Deed::Twice,
            ("swap", None) => Deed::Swap,
            ("reflect", None) => Deed::Reflect,
            ("delay", Some(millis)) => Deed::Delay(Duration::from_millis(millis as u64)),
            ("flip", Some(bit)) => Deed::Flip(bit),
            ("truncate", Some(bytes)) => Deed::Truncate(bytes),
            ("splice", Some(packet)) if matches!(place, Place::Up | Place::Down) => {
                Deed::Splice(packet)
            }
            _ => return Err(wrong("there is no such deed there")),
        };
        Ok(Self { text: text.to_owned(), place, which, deed })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A packet that passed.
struct Passed {
    socket: usize,
    from_agent: bool,
    number: usize,
    message: Message,
}

/// Packets that are remembered, to be spliced in.
const REMEMBERED: usize = 4096;

/// Rules at work.
pub struct Meddler {
    rules: Vec<(Rule, usize)>,
    passed: Vec<Passed>,
    report: Box<dyn FnMut(Value) + Send>,
}

impl fmt::Debug for Meddler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meddler").field("rules", &self.rules).finish_non_exhaustive()
    }
}

impl Meddler {
    /// Applies the first rule that fits, and reports each time.
    pub fn new(rules: Vec<Rule>, report: impl FnMut(Value) + Send + 'static) -> Self {
        let rules = rules.into_iter().map(|rule| (rule, 0)).collect();
        Self { rules, passed: Vec::new(), report: Box::new(report) }
    }

    /// What becomes of a message.
    pub fn judge(&mut self, mut passing: Passing<'_>) -> Verdict {
        if let Passing::Data(data) = &passing
            && self.passed.len() < REMEMBERED
        {
            self.passed.push(Passed {
                socket: data.socket,
                from_agent: data.from_agent,
                number: data.number,
                message: data.message.clone(),
            });
        }
        let mut found = None;
        for (rule, seen) in &mut self.rules {
            let Some(number) = rule.number_of(&passing, seen) else { continue };
            if (rule.which.first..=rule.which.last).contains(&number) && found.is_none() {
                found = Some((rule.clone(), number));
            }
        }
        let Some((rule, number)) = found else {
            return Verdict::Forward;
        };
        let verdict = self.apply(rule.deed, &mut passing);
        (self.report)(
            json!({ "what": "meddled", "rule": rule.text, "number": number, "done": verdict.is_some() }),
        );
        verdict.unwrap_or(Verdict::Forward)
    }

    /// Does it; `None` where it cannot be done to this message.
    fn apply(&self, deed: Deed, passing: &mut Passing<'_>) -> Option<Verdict> {
        let bent = |change: &dyn Fn(&mut Vec<u8>) -> Option<()>, passing: &mut Passing<'_>| {
            change_bytes(passing, change).map(|()| Verdict::Forward)
        };
        match deed {
            Deed::Drop => Some(Verdict::Drop),
            Deed::Twice => Some(Verdict::Twice),
            Deed::Swap => Some(Verdict::Swap),
            Deed::Reflect => Some(Verdict::Reflect),
            Deed::Delay(time) => Some(Verdict::Delay(time)),
            Deed::Flip(bit) => bent(
                &|bytes| {
                    *bytes.get_mut(bit / 8)? ^= 1 << (bit % 8);
                    Some(())
                },
                passing,
            ),
            Deed::Truncate(length) => bent(
                &|bytes| {
                    let shorter = length < bytes.len();
                    bytes.truncate(length);
                    shorter.then_some(())
                },
                passing,
            ),
            Deed::Splice(number) => {
                let Passing::Data(data) = passing else { return None };
                let other = self.passed.iter().rev().find(|passed| {
                    passed.socket != data.socket
                        && passed.from_agent == data.from_agent
                        && passed.number == number
                })?;
                *data.message = other.message.clone();
                Some(Verdict::Forward)
            }
        }
    }
}

/// Changes the bytes of a packet: of one in base64 those that it stands for, so that it stays one.
fn change_bytes(
    passing: &mut Passing<'_>,
    change: &dyn Fn(&mut Vec<u8>) -> Option<()>,
) -> Option<()> {
    match passing {
        Passing::Data(data) => match &mut *data.message {
            Message::Text(text) => {
                let mut text = text.as_bytes().to_vec();
                let mut bytes = decode_base64(&mut text).ok()?.to_vec();
                change(&mut bytes)?;
                let mut packet = Vec::new();
                encode_base64(&bytes, &mut packet);
                *data.message = Message::text(String::from_utf8(packet).ok()?);
                Some(())
            }
            Message::Binary(packet) => {
                let mut bytes = packet.to_vec();
                change(&mut bytes)?;
                *data.message = Message::binary(bytes);
                Some(())
            }
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => None,
        },
        // Of control messages the handshake messages that they carry, which nobody there understands.
        Passing::ToHub(message) => {
            let bytes = match message {
                FromAgent::AcceptTunnel { message, .. } => &mut message.0,
                FromAgent::Request { request: control::Request::OpenTunnel(request), .. } => {
                    &mut request.message.0
                }
                FromAgent::Redeem(_)
                | FromAgent::Login(_)
                | FromAgent::Request { .. }
                | FromAgent::RefuseTunnel { .. } => return None,
            };
            change(bytes)
        }
        Passing::ToAgent(message) => {
            let bytes = match message {
                FromHub::IncomingTunnel { request, .. } => &mut request.message.0,
                FromHub::Reply {
                    reply: control::Reply::TunnelAccepted { message, .. }, ..
                } => &mut message.0,
                FromHub::Challenge { .. }
                | FromHub::Invitation { .. }
                | FromHub::Welcome { .. }
                | FromHub::Reply { .. }
                | FromHub::LogGrew { .. }
                | FromHub::WrapStored { .. }
                | FromHub::ShareMade { .. }
                | FromHub::Renewed { .. }
                | FromHub::Error(_)
                | FromHub::Restarting { .. } => return None,
            };
            change(bytes)
        }
    }
}

impl Rule {
    /// The number of a message among those that this rule is about; counts it.
    fn number_of(&self, passing: &Passing<'_>, seen: &mut usize) -> Option<usize> {
        let kinds = match (&self.place, passing) {
            (Place::Up, Passing::Data(data)) if data.from_agent => return Some(data.number),
            (Place::Down, Passing::Data(data)) if !data.from_agent => return Some(data.number),
            (Place::ToHub(wanted), Passing::ToHub(message)) => {
                (wanted, serde_json::to_value(&**message))
            }
            (Place::ToAgent(wanted), Passing::ToAgent(message)) => {
                (wanted, serde_json::to_value(&**message))
            }
            (Place::Up | Place::Down | Place::ToHub(_) | Place::ToAgent(_), _) => return None,
        };
        let (wanted, Ok(value)) = kinds else { return None };
        let fits = wanted.as_ref().is_none_or(|wanted| {
            [&value["type"], &value["request"]["do"], &value["reply"]["is"]]
                .contains(&&Value::from(wanted.as_str()))
        });
        if !fits {
            return None;
        }
        *seen += 1;
        Some(*seen - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_nonsense_is_refused() {
        for text in [
            "up:drop",
            "down#3:twice",
            "up#3-5:swap",
            "to-hub/open_tunnel#0:reflect",
            "to-agent:delay=100",
            "up#2-:flip=17",
            "down#0:truncate=0",
            "up#1:splice=0",
        ] {
            assert_eq!(text.parse::<Rule>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "up",
            "sideways:drop",
            "up/accept_tunnel:drop",
            "up#x:drop",
            "up#-3:drop",
            "up:flip",
            "up:drop=1",
            "up:explode",
            "to-hub:splice=1",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
