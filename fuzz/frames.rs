//! Heads of WebSocket frames, held against another library's reader, and a relay whose frames come and go cut
//! at any place.

use std::{
    cell::RefCell,
    future::pending,
    io::{self, Cursor},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use connect_hub::relay::{Ended, Leg, Meter, Side, relay};
use connect_spec::{
    control::close,
    encoding::Encoding,
    frame::{self, Head, MAX_CONTROL_BYTES, MAX_HEAD_BYTES, Opcode, Parsed, Sender},
    limits::MAX_DATA_FRAME_BYTES,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    runtime::{Builder, Runtime},
};
use tokio_tungstenite::tungstenite::protocol::frame::{
    FrameHeader,
    coding::{Control, Data, OpCode},
};

fn opcode(theirs: OpCode) -> Option<Opcode> {
    Some(match theirs {
        OpCode::Data(Data::Continue) => Opcode::Continuation,
        OpCode::Data(Data::Text) => Opcode::Text,
        OpCode::Data(Data::Binary) => Opcode::Binary,
        OpCode::Control(Control::Close) => Opcode::Close,
        OpCode::Control(Control::Ping) => Opcode::Ping,
        OpCode::Control(Control::Pong) => Opcode::Pong,
        OpCode::Data(Data::Reserved(_)) | OpCode::Control(Control::Reserved(_)) => return None,
    })
}

/// What RFC 6455 and our limit say of the head that `bytes` begins with, as the other library reads it:
/// `None` while it is not whole.
fn reference(bytes: &[u8], sender: Sender) -> Option<Result<(Head, usize), u16>> {
    let mut cursor = Cursor::new(bytes);
    let (header, length) = match FrameHeader::parse(&mut cursor) {
        Ok(parsed) => parsed?,
        Err(_) => return Some(Err(close::PROTOCOL)),
    };
    let whole = usize::try_from(cursor.position()).expect("within the input");
    let reserved = header.rsv1 || header.rsv2 || header.rsv3;
    let Some(opcode) = opcode(header.opcode).filter(|_| !reserved) else {
        return Some(Err(close::PROTOCOL));
    };
    let in_parts = opcode.is_control() && (!header.is_final || length > 125);
    let longer_than_needed = header.len(length) != whole;
    if header.mask.is_some() != (sender == Sender::Client) || in_parts || longer_than_needed {
        return Some(Err(close::PROTOCOL));
    }
    Some(match usize::try_from(length) {
        Ok(length) if length <= MAX_DATA_FRAME_BYTES => {
            let head = Head { fin: header.is_final, opcode, length, mask: header.mask };
            Ok((head, whole))
        }
        Ok(_) | Err(_) => Err(close::TOO_BIG),
    })
}

fn head(bytes: &[u8], sender: Sender) {
    let parsed = Head::parse(bytes, sender);
    match reference(bytes, sender) {
        Some(Ok((head, whole))) => {
            assert_eq!(parsed, Ok(Parsed::Head(head, whole)));
            let mut written = [0; MAX_HEAD_BYTES];
            assert_eq!(head.write(&mut written), whole);
            assert_eq!(written[..whole], bytes[..whole]);
        }
        Some(Err(_)) => assert!(parsed.is_err()),
        // It may be refused before it is whole.
        None => {
            if let Ok(parsed) = parsed {
                let Parsed::Missing(missing) = parsed else {
                    panic!("{parsed:?} of half a head");
                };
                assert!((1..MAX_HEAD_BYTES).contains(&missing));
            }
        }
    }
}

/// Masking does not depend on how the bytes are cut.
fn masks(bytes: &[u8], key: [u8; 4]) {
    let mut whole = bytes.to_vec();
    frame::mask(&mut whole, key);
    let at = bytes.len() / 3;
    let mut turned = key;
    turned.rotate_left(at % 4);
    let mut parts = vec![0; bytes.len()];
    frame::mask_to(&bytes[..at], &mut parts[..at], key);
    frame::mask_to(&bytes[at..], &mut parts[at..], turned);
    assert_eq!(whole, parts);
    frame::mask(&mut whole, key);
    assert_eq!(whole, bytes);
}

/// How the frames of one end are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Vanished,
    Closed,
    Violated(u16),
}

/// What the other end must get of `sent`, and how that ends: bytes, without control frames but the close.
fn translated(sent: &[u8], encoding: Encoding) -> (Vec<u8>, Over) {
    let data = if encoding == Encoding::Base64 { Opcode::Text } else { Opcode::Binary };
    let (mut rest, mut out) = (sent, Vec::new());
    // Of a message that is not at its end.
    let mut message = None;
    loop {
        let (head, length) = match reference(rest, Sender::Client) {
            Some(Ok(found)) => found,
            Some(Err(code)) => return (out, Over::Violated(code)),
            None => {
                let early = Head::parse(rest, Sender::Client).is_err();
                return (out, if early { Over::Violated(close::PROTOCOL) } else { Over::Vanished });
            }
        };
        rest = &rest[length..];
        let mut payload = rest[..head.length.min(rest.len())].to_vec();
        rest = &rest[payload.len()..];
        frame::mask(&mut payload, head.mask.expect("a client's"));
        if !head.opcode.is_control() {
            let before = match (head.opcode, message) {
                (Opcode::Continuation, Some(before)) => before,
                (Opcode::Continuation, None) | (_, Some(_)) => {
                    return (out, Over::Violated(close::PROTOCOL));
                }
                (opcode, None) if opcode == data => 0,
                (_, None) => return (out, Over::Violated(close::UNSUPPORTED)),
            };
            if before + head.length > MAX_DATA_FRAME_BYTES {
                return (out, Over::Violated(close::TOO_BIG));
            }
            message = (!head.fin).then_some(before + head.length);
            put(&mut out, Head { mask: None, ..head }, &payload);
        }
        if payload.len() < head.length {
            return (out, Over::Vanished);
        }
        if head.opcode == Opcode::Close {
            if payload.len() == 1 {
                return (out, Over::Violated(close::PROTOCOL));
            }
            put(&mut out, Head { mask: None, ..head }, &payload);
            return (out, Over::Closed);
        }
    }
}

fn put(out: &mut Vec<u8>, head: Head, payload: &[u8]) {
    let mut written = [0; MAX_HEAD_BYTES];
    let length = head.write(&mut written);
    out.extend_from_slice(&written[..length]);
    out.extend_from_slice(payload);
}

/// A close that an end got: where it begins, and whether all of it is there.
#[derive(Debug, Clone, Copy)]
struct Close {
    at: usize,
    is_whole: bool,
}

/// What an end got, without the pongs that its own pings earned, and the close in it.
fn without_pongs(mut got: &[u8]) -> (Vec<u8>, Option<Close>) {
    let (mut out, mut close) = (Vec::new(), None);
    while !got.is_empty() {
        let (head, length) = match reference(got, Sender::Server) {
            Some(Ok(found)) => found,
            Some(Err(code)) => panic!("the relay wrote no frame, but what deserves {code}"),
            // A head of which only a part was written yet.
            None => return ([out.as_slice(), got].concat(), close),
        };
        let end = (length + head.length).min(got.len());
        assert!(close.is_none(), "something follows a close");
        assert_ne!(head.opcode, Opcode::Ping, "the relay asks nothing");
        if head.opcode == Opcode::Close {
            close = Some(Close { at: out.len(), is_whole: end == length + head.length });
        }
        if head.opcode == Opcode::Pong {
            // Of which, too, only a part may be written yet.
            assert!(head.length <= MAX_CONTROL_BYTES);
        } else {
            out.extend_from_slice(&got[..end]);
        }
        got = &got[end..];
    }
    (out, close)
}

/// A socket that gives and takes pieces of any length, and now and then nothing.
struct Pieces {
    unread: Bytes,
    got: Arc<Mutex<Vec<u8>>>,
    /// Picks the next length.
    dice: u32,
    /// At the end of its bytes it says nothing more until it is told to.
    lingers: bool,
    shut: bool,
}

impl Pieces {
    /// How many bytes move now; 0 is none, and to be asked again.
    fn next(&mut self, cx: &Context<'_>) -> usize {
        self.dice = self.dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let length = match self.dice >> 24 {
            0..=31 => 0,
            32..=127 => 1 + (self.dice >> 16 & 7) as usize,
            _ => 1 + (self.dice >> 8 & 0xfff) as usize,
        };
        if length == 0 {
            cx.waker().wake_by_ref();
        }
        length
    }

    fn is_told(&self) -> bool {
        let (_, close) = without_pongs(&self.got.lock().expect("one thread"));
        self.shut || close.is_some_and(|close| close.is_whole)
    }
}

impl AsyncRead for Pieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return if self.lingers && !self.is_told() {
                Poll::Pending
            } else {
                Poll::Ready(Ok(()))
            };
        }
        let length = self.next(cx).min(self.unread.len()).min(buffer.remaining());
        if length == 0 {
            return Poll::Pending;
        }
        buffer.put_slice(&self.unread.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let length = self.next(cx).min(bytes.len());
        if length == 0 {
            return Poll::Pending;
        }
        self.got.lock().expect("one thread").extend_from_slice(&bytes[..length]);
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}

thread_local! {
    static RUNTIME: RefCell<Runtime> =
        RefCell::new(Builder::new_current_thread().enable_time().build().expect("a runtime"));
}

/// Joins two ends: the reacher vanishes after its last byte, the exposer stays.
fn splice(reacher: &[u8], exposer: &[u8], encoding: Encoding, dice: u32) {
    let end = |sent: &[u8], dice, lingers| {
        let got = Arc::<Mutex<Vec<u8>>>::default();
        let unread = Bytes::copy_from_slice(sent);
        let io = Pieces { unread, got: Arc::clone(&got), dice, lingers, shut: false };
        (Leg { io, early: Bytes::new() }, got)
    };
    let (near, at_reacher) = end(reacher, dice, false);
    let (far, at_exposer) = end(exposer, !dice, true);
    let meter = Arc::new(Meter::default());
    let ended = RUNTIME
        .with_borrow(|runtime| runtime.block_on(relay(near, far, encoding, &meter, pending())));
    let got = |end: &Mutex<Vec<u8>>| without_pongs(&end.lock().expect("one thread"));
    let ((up, up_close), (down, down_close)) = (got(&at_exposer), got(&at_reacher));
    let (wanted_up, up_over) = translated(reacher, encoding);
    let (wanted_down, down_over) = translated(exposer, encoding);
    // A close of the hub's own may follow what the other end sent.
    let sent_on = |got: &[u8], close: Option<Close>, wanted: &[u8]| {
        let data = close.map_or(got, |close| &got[..close.at]);
        assert!(wanted.starts_with(got) || wanted.starts_with(data), "what arrives was sent");
        wanted.starts_with(got) && got.len() == wanted.len() || data.len() == wanted.len()
    };
    let whole_up = sent_on(&up, up_close, &wanted_up);
    sent_on(&down, down_close, &wanted_down);
    assert!(meter.sent.by(Side::Reacher) <= reacher.len() as u64);
    if down_over == Over::Vanished {
        // Nothing cut the reacher short.
        assert!(whole_up, "what was sent arrives");
        let wanted = match up_over {
            Over::Vanished => Ended::Vanished(Side::Reacher),
            Over::Closed => Ended::Closed(Side::Reacher),
            Over::Violated(code) => Ended::Violated(Side::Reacher, code),
        };
        assert_eq!(ended, wanted);
    }
}

/// The first byte says how, the second how much of the rest the exposer sends; the others are what both send.
pub(crate) fn run(input: &[u8]) {
    let Some(([how, share, a, b], rest)) = input.split_first_chunk::<4>() else { return };
    let sender = if how & 1 == 0 { Sender::Client } else { Sender::Server };
    head(rest, sender);
    masks(rest, [*how, *share, *a, *b]);
    let encoding = if how & 2 == 0 { Encoding::Base64 } else { Encoding::Binary };
    let (exposer, reacher) = rest.split_at(usize::from(*share).min(rest.len()));
    splice(reacher, exposer, encoding, u32::from_be_bytes([*how, *share, *a, *b]));
}

/// Frames of each kind.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let frame = |fin: bool, opcode: Opcode, payload: &[u8]| {
        let (mut out, mut masked, key) = (Vec::new(), payload.to_vec(), [1, 2, 3, 4]);
        frame::mask(&mut masked, key);
        put(&mut out, Head { fin, opcode, length: payload.len(), mask: Some(key) }, &masked);
        out
    };
    let seed = |how: u8, reacher: &[Vec<u8>], exposer: &[Vec<u8>]| {
        let (reacher, exposer) = (reacher.concat(), exposer.concat());
        let share = u8::try_from(exposer.len()).expect("a short seed");
        [&[how, share, 3, 4][..], &exposer, &reacher].concat()
    };
    let text = frame(true, Opcode::Text, b"AAAA");
    let long = frame(true, Opcode::Binary, &[7; 300]);
    let ping = frame(true, Opcode::Ping, b"are you there");
    let bye = frame(true, Opcode::Close, &1000_u16.to_be_bytes());
    let parts = [frame(false, Opcode::Text, b"AA"), frame(true, Opcode::Continuation, b"BB")];
    vec![
        ("both", seed(0, &[text.clone(), ping.clone()], &[ping.clone(), text.clone()])),
        ("long", seed(2, &[long.clone(), long], &[])),
        (
            "parts",
            seed(0, &[parts[0].clone(), ping.clone(), parts[1].clone(), bye.clone()], &[ping]),
        ),
        ("closed", seed(0, &[text.clone(), text.clone()], &[text.clone(), bye])),
        ("wrong", seed(2, &[text], &[])),
        ("server", [&[1, 0, 0, 0][..], &[0x82, 126, 1, 0], &[9; 20]].concat()),
    ]
}
