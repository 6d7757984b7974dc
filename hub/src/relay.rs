//! The data plane: joins the two data sockets of a tunnel, at the level of WebSocket frames.
//!
//! An agent's frame is masked (RFC 6455 section 5.3), the hub's is not, so the relay reads frame headers,
//! unmasks payloads and writes them on. It never looks into a payload, and it does not wait for the end
//! of a frame: what has arrived goes on at once. Back-pressure is TCP's: while one end does not take
//! its bytes, nothing more is read from the other.
//!
//! Memory: a thread's scratch buffers serve all its tunnels. A tunnel holds a buffer of its own only
//! while one end is slow, one for each direction, [`RELAY_BUFFER_BYTES`] long; an idle tunnel holds none.

use std::{
    cell::RefCell,
    convert::Infallible,
    future::{Future, poll_fn},
    io, mem,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use connect_spec::{
    control::close,
    encoding::Encoding,
    frame::{self, FrameError, Head, MAX_CONTROL_BYTES, MAX_HEAD_BYTES, Opcode, Parsed, Sender},
    limits::MAX_DATA_FRAME_BYTES,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{MissedTickBehavior, interval, timeout},
};

use crate::limits::{FAREWELL_LIMIT, RELAY_BUFFER_BYTES, TUNNEL_IDLE_CHECK, TUNNEL_IDLE_CHECKS};

/// Room that the output needs beyond the input: a header that arrived earlier, a pong, a close.
const SLACK_BYTES: usize = 512;
/// One data socket after its upgrade.
#[derive(Debug)]
pub struct Leg<T> {
    /// The socket.
    pub io: T,
    /// What arrived with the upgrade request, read before `io`.
    pub early: Bytes,
}

impl<T: AsyncRead + Unpin> Leg<T> {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.has_remaining() {
            let length = self.early.remaining().min(buffer.remaining());
            buffer.put_slice(&self.early.split_to(length));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

/// Which of the two data sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The end that asked for the tunnel.
    Reacher,
    /// The end that accepted it.
    Exposer,
}

/// Why a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// This end closed, as the protocol has it.
    Closed(Side),
    /// This end vanished without a word.
    Vanished(Side),
    /// This end broke the protocol and was closed with the code.
    Violated(Side, u16),
    /// Neither end said anything for a long time.
    Idle,
    /// The hub ended it with the code.
    Stopped(u16),
}

/// Payload bytes that the two ends sent.
#[derive(Debug, Default)]
pub struct Sent {
    from_reacher: AtomicU64,
    from_exposer: AtomicU64,
}

impl Sent {
    fn counter(&self, side: Side) -> &AtomicU64 {
        match side {
            Side::Reacher => &self.from_reacher,
            Side::Exposer => &self.from_exposer,
        }
    }

    /// By this end.
    #[must_use]
    pub fn by(&self, side: Side) -> u64 {
        self.counter(side).load(Ordering::Relaxed)
    }
}

/// What a tunnel moves and holds, for others to look at while it lives.
#[derive(Debug, Default)]
pub struct Meter {
    /// In this tunnel.
    pub sent: Sent,
    /// In all tunnels.
    all_sent: Arc<Sent>,
    /// Bytes that wait for a slow end, in the tunnels of a workspace.
    held: Arc<AtomicUsize>,
}

impl Meter {
    /// Counts for one tunnel, and adds to what others count with.
    #[must_use]
    pub fn new(all_sent: Arc<Sent>, held: Arc<AtomicUsize>) -> Self {
        Self { sent: Sent::default(), all_sent, held }
    }

    fn note_sent(&self, side: Side, bytes: u64) {
        self.sent.counter(side).fetch_add(bytes, Ordering::Relaxed);
        self.all_sent.counter(side).fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A buffer that waits, counted.
#[derive(Debug)]
struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    fn new(held: &Arc<AtomicUsize>) -> Self {
        held.fetch_add(RELAY_BUFFER_BYTES, Ordering::Relaxed);
        Self(Arc::clone(held))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(RELAY_BUFFER_BYTES, Ordering::Relaxed);
    }
}

/// A control frame's payload.
#[derive(Debug, Clone, Copy)]
struct Control {
    length: usize,
    bytes: [u8; MAX_CONTROL_BYTES],
}

impl Control {
    fn payload(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Appends to a slice that is long enough by construction.
struct Output<'b> {
    buffer: &'b mut [u8],
    length: usize,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    fn room(&mut self, length: usize) -> &mut [u8] {
        let start = self.length;
        self.length += length;
        &mut self.buffer[start..self.length]
    }

    /// A head of the hub's own, which masks nothing.
    fn put_head(&mut self, fin: bool, opcode: Opcode, length: usize) {
        self.length +=
            Head { fin, opcode, length, mask: None }.write(&mut self.buffer[self.length..]);
    }

    fn put_control(&mut self, opcode: Opcode, payload: &[u8]) {
        self.put_head(true, opcode, payload.len());
        self.put(payload);
    }
}

/// A breach of the protocol, with the code that closes the socket for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Violation(u16);

impl From<FrameError> for Violation {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Protocol => Self(close::PROTOCOL),
            FrameError::TooLong => Self(close::TOO_BIG),
        }
    }
}

/// Whether more frames may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    More,
    /// A close frame went through; what follows it is not read.
    Closed,
}

/// Where in the frames of one sender the bytes are.
#[derive(Debug)]
enum State {
    Head { have: usize, bytes: [u8; MAX_HEAD_BYTES] },
    Data { left: usize, mask: [u8; 4] },
    Control { opcode: Opcode, mask: [u8; 4], have: usize, payload: Control },
}

const NEXT_FRAME: State = State::Head { have: 0, bytes: [0; MAX_HEAD_BYTES] };

/// Turns the masked frames of one agent into the hub's unmasked frames for the other, byte by byte if
/// need be.
#[derive(Debug)]
struct Translator {
    /// The one kind of data message that the subprotocol has.
    data_opcode: Opcode,
    state: State,
    /// Inside a fragmented message.
    in_message: bool,
    /// Payload of the current message so far.
    message_bytes: usize,
    /// Payload of data frames that nobody was told of.
    unnoted: u64,
}

impl Translator {
    fn new(encoding: Encoding) -> Self {
        let data_opcode = match encoding {
            Encoding::Base64 => Opcode::Text,
            Encoding::Binary => Opcode::Binary,
        };
        Self { data_opcode, state: NEXT_FRAME, in_message: false, message_bytes: 0, unnoted: 0 }
    }

    /// Whether the output so far ends between two frames, so that a control frame may follow.
    fn at_boundary(&self) -> bool {
        !matches!(self.state, State::Data { .. })
    }

    /// Translates all of `input`. `pong` is for the receiver and goes out at the next boundary; a ping
    /// of the sender is left in `answer`, for the translator of the other direction.
    fn translate(
        &mut self,
        mut input: &[u8],
        output: &mut Output<'_>,
        pong: &mut Option<Control>,
        answer: &mut Option<Control>,
    ) -> Result<Step, Violation> {
        loop {
            if self.at_boundary()
                && let Some(pong) = pong.take()
            {
                output.put_control(Opcode::Pong, pong.payload());
            }
            match &mut self.state {
                State::Head { have, bytes } => {
                    let head = loop {
                        match Head::parse(&bytes[..*have], Sender::Client)? {
                            Parsed::Head(head, _) => break head,
                            Parsed::Missing(_) if input.is_empty() => return Ok(Step::More),
                            Parsed::Missing(missing) => {
                                let (now, rest) = input.split_at(missing.min(input.len()));
                                bytes[*have..*have + now.len()].copy_from_slice(now);
                                *have += now.len();
                                input = rest;
                            }
                        }
                    };
                    self.begin_frame(&head, output)?;
                }
                State::Data { left: 0, .. } => self.state = NEXT_FRAME,
                State::Data { left, mask } => {
                    if input.is_empty() {
                        return Ok(Step::More);
                    }
                    let taken = (*left).min(input.len());
                    let (now, rest) = input.split_at(taken);
                    frame::mask_to(now, output.room(taken), *mask);
                    mask.rotate_left(taken % 4);
                    *left -= taken;
                    self.unnoted += taken as u64;
                    input = rest;
                }
                State::Control { opcode, mask, have, payload } => {
                    let taken = (payload.length - *have).min(input.len());
                    let (now, rest) = input.split_at(taken);
                    payload.bytes[*have..*have + taken].copy_from_slice(now);
                    *have += taken;
                    input = rest;
                    if *have < payload.length {
                        return Ok(Step::More);
                    }
                    frame::mask(&mut payload.bytes, *mask);
                    let (opcode, payload) = (*opcode, *payload);
                    self.state = NEXT_FRAME;
                    match opcode {
                        Opcode::Close if payload.length == 1 => {
                            return Err(Violation(close::PROTOCOL));
                        }
                        Opcode::Close => {
                            output.put_control(Opcode::Close, payload.payload());
                            return Ok(Step::Closed);
                        }
                        // Only the latest needs an answer (RFC 6455 section 5.5.3).
                        Opcode::Ping => *answer = Some(payload),
                        // Unasked-for pongs are allowed and mean nothing; data has a state of its own.
                        Opcode::Pong | Opcode::Continuation | Opcode::Text | Opcode::Binary => {}
                    }
                }
            }
        }
    }

    /// Judges a complete head and, for data, writes the hub's own.
    fn begin_frame(&mut self, head: &Head, output: &mut Output<'_>) -> Result<(), Violation> {
        let Head { fin, opcode, length, .. } = *head;
        let mask = head.mask.expect("a client's head has one");
        match opcode {
            Opcode::Close | Opcode::Ping | Opcode::Pong => {
                let payload = Control { length, bytes: [0; MAX_CONTROL_BYTES] };
                self.state = State::Control { opcode, mask, have: 0, payload };
                return Ok(());
            }
            Opcode::Continuation if self.in_message => {}
            Opcode::Text | Opcode::Binary if self.in_message => {
                return Err(Violation(close::PROTOCOL));
            }
            Opcode::Text | Opcode::Binary if opcode != self.data_opcode => {
                return Err(Violation(close::UNSUPPORTED));
            }
            Opcode::Text | Opcode::Binary => self.message_bytes = 0,
            Opcode::Continuation => return Err(Violation(close::PROTOCOL)),
        }
        self.message_bytes += length;
        if self.message_bytes > MAX_DATA_FRAME_BYTES {
            return Err(Violation(close::TOO_BIG));
        }
        self.in_message = !fin;
        output.put_head(fin, opcode, length);
        self.state = State::Data { left: length, mask };
        Ok(())
    }
}

/// Buffers that all tunnels of a thread share between polls.
struct Scratch {
    input: Box<[u8]>,
    output: Box<[u8]>,
    /// Outputs that a slow end has given back.
    spare: Vec<Box<[u8]>>,
}

/// Spare buffers that a thread keeps.
const MAX_SPARE: usize = 8;

fn new_output() -> Box<[u8]> {
    vec![0; RELAY_BUFFER_BYTES + SLACK_BYTES].into_boxed_slice()
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        input: vec![0; RELAY_BUFFER_BYTES].into_boxed_slice(),
        output: new_output(),
        spare: Vec::new(),
    });
}

impl Scratch {
    fn take_output(&mut self) -> Box<[u8]> {
        let next = self.spare.pop().unwrap_or_else(new_output);
        mem::replace(&mut self.output, next)
    }

    fn give_back(&mut self, buffer: Box<[u8]>) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(buffer);
        }
    }
}

/// Output that its receiver did not take yet.
#[derive(Debug)]
struct Held {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    _waiting: Waiting,
}

/// How one direction ended.
#[derive(Debug, Clone, Copy)]
enum FlowEnd {
    Closed,
    SourceVanished,
    SinkVanished,
    Violated(Violation),
}

/// One direction of a tunnel.
#[derive(Debug)]
struct Flow {
    meter: Arc<Meter>,
    source: Side,
    translator: Translator,
    held: Option<Held>,
    /// Written, and perhaps still in a buffer of the TLS layer.
    unflushed: bool,
    /// Nothing more comes from the source; told once the sink has all that came before.
    ended: Option<FlowEnd>,
    /// Something moved since the last look.
    moved: bool,
}

impl Flow {
    fn new(encoding: Encoding, source: Side, meter: &Arc<Meter>) -> Self {
        Self {
            meter: Arc::clone(meter),
            source,
            translator: Translator::new(encoding),
            held: None,
            unflushed: false,
            ended: None,
            moved: false,
        }
    }

    /// Whether a waiting pong could go out at once.
    fn could_speak(&self) -> bool {
        self.held.is_none() && self.ended.is_none() && self.translator.at_boundary()
    }

    /// Moves bytes until the source has none or the sink takes none; errs when this direction has ended.
    ///
    /// `pong` is for the sink; `answer` takes what a ping of the source deserves.
    fn poll<S, D>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Leg<S>,
        sink: &mut Leg<D>,
        pong: &mut Option<Control>,
        answer: &mut Option<Control>,
    ) -> Poll<Result<Infallible, FlowEnd>>
    where
        S: AsyncRead + Unpin,
        D: AsyncWrite + Unpin,
    {
        SCRATCH.with_borrow_mut(|scratch| {
            loop {
                ready!(self.poll_write_held(cx, sink, scratch))?;
                if let Some(end) = self.ended {
                    ready!(self.poll_flush(cx, sink))?;
                    return Poll::Ready(Err(end));
                }
                let mut input = ReadBuf::new(&mut scratch.input);
                let vanished = poll_fill(cx, source, &mut input);
                let speak = pong.is_some() && self.could_speak();
                if input.filled().is_empty() && !vanished && !speak {
                    // Registered to be woken by whichever of the two waits.
                    let _ = self.poll_flush(cx, sink)?;
                    return Poll::Pending;
                }
                let mut output = Output { buffer: &mut scratch.output, length: 0 };
                self.ended =
                    match self.translator.translate(input.filled(), &mut output, pong, answer) {
                        Err(violation) => Some(FlowEnd::Violated(violation)),
                        Ok(Step::Closed) => Some(FlowEnd::Closed),
                        Ok(Step::More) if vanished => Some(FlowEnd::SourceVanished),
                        Ok(Step::More) => None,
                    };
                self.moved = true;
                self.meter.note_sent(self.source, mem::take(&mut self.translator.unnoted));
                let end = output.length;
                let start = self.poll_write(cx, sink, &scratch.output[..end])?;
                if start < end {
                    let buffer = scratch.take_output();
                    let waiting = Waiting::new(&self.meter.held);
                    self.held = Some(Held { buffer, start, end, _waiting: waiting });
                    return Poll::Pending;
                }
            }
        })
    }

    /// Writes until all is taken or the sink makes us wait; the number of bytes taken.
    fn poll_write<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Leg<D>,
        bytes: &[u8],
    ) -> Result<usize, FlowEnd> {
        let mut taken = 0;
        while taken < bytes.len() {
            match Pin::new(&mut sink.io).poll_write(cx, &bytes[taken..]) {
                Poll::Pending => break,
                Poll::Ready(Ok(0) | Err(_)) => return Err(FlowEnd::SinkVanished),
                Poll::Ready(Ok(now)) => taken += now,
            }
        }
        self.unflushed |= taken > 0;
        Ok(taken)
    }

    fn poll_write_held<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Leg<D>,
        scratch: &mut Scratch,
    ) -> Poll<Result<(), FlowEnd>> {
        let Some(mut held) = self.held.take() else {
            return Poll::Ready(Ok(()));
        };
        let taken = self.poll_write(cx, sink, &held.buffer[held.start..held.end])?;
        self.moved |= taken > 0;
        held.start += taken;
        if held.start < held.end {
            self.held = Some(held);
            return Poll::Pending;
        }
        scratch.give_back(held.buffer);
        Poll::Ready(Ok(()))
    }

    fn poll_flush<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Leg<D>,
    ) -> Poll<Result<(), FlowEnd>> {
        if self.unflushed {
            ready!(Pin::new(&mut sink.io).poll_flush(cx)).map_err(|_| FlowEnd::SinkVanished)?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// Reads all that is there and fits; true when the source will send no more.
fn poll_fill<S: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    source: &mut Leg<S>,
    input: &mut ReadBuf<'_>,
) -> bool {
    // A TLS layer hands out one record at a time: gather them for one write. For TCP the second
    // attempt costs no system call.
    while input.remaining() > 0 {
        let before = input.filled().len();
        match source.poll_read(cx, input) {
            Poll::Pending => return false,
            Poll::Ready(Ok(())) if input.filled().len() > before => {}
            Poll::Ready(Ok(()) | Err(_)) => return true,
        }
    }
    false
}

/// Forwards frames between the two ends until one of them, or `stop`, ends the tunnel.
///
/// `meter` counts what went through. `stop` gives the code with which both sockets are then closed. Both sockets are closed in any case;
/// dropped before that, the relay drops them without a word.
pub async fn relay<R, E>(
    mut reacher: Leg<R>,
    mut exposer: Leg<E>,
    encoding: Encoding,
    meter: &Arc<Meter>,
    stop: impl Future<Output = u16>,
) -> Ended
where
    R: AsyncRead + AsyncWrite + Unpin,
    E: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Flow::new(encoding, Side::Reacher, meter);
    let mut down = Flow::new(encoding, Side::Exposer, meter);
    let (mut to_reacher, mut to_exposer) = (None, None);
    let mut stop = pin!(stop);
    let mut idle_check = interval(TUNNEL_IDLE_CHECK);
    idle_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut idle_checks = 0;

    let ended = poll_fn(|cx| {
        if let Poll::Ready(code) = stop.as_mut().poll(cx) {
            return Poll::Ready(Ended::Stopped(code));
        }
        loop {
            if let Poll::Ready(Err(end)) =
                up.poll(cx, &mut reacher, &mut exposer, &mut to_exposer, &mut to_reacher)
            {
                return Poll::Ready(Ended::of(Side::Reacher, end));
            }
            if let Poll::Ready(Err(end)) =
                down.poll(cx, &mut exposer, &mut reacher, &mut to_reacher, &mut to_exposer)
            {
                return Poll::Ready(Ended::of(Side::Exposer, end));
            }
            // The second direction may have left a pong for the first.
            if to_exposer.is_none() || !up.could_speak() {
                break;
            }
        }
        while idle_check.poll_tick(cx).is_ready() {
            let moved = mem::take(&mut up.moved) | mem::take(&mut down.moved);
            idle_checks = if moved { 0 } else { idle_checks + 1 };
            if idle_checks > TUNNEL_IDLE_CHECKS {
                return Poll::Ready(Ended::Idle);
            }
        }
        Poll::Pending
    })
    .await;

    match ended {
        Ended::Closed(side) => {
            // The close has been forwarded: the other end still says what it has to say, and closes.
            let other = poll_fn(|cx| match side {
                Side::Reacher => {
                    down.poll(cx, &mut exposer, &mut reacher, &mut to_reacher, &mut to_exposer)
                }
                Side::Exposer => {
                    up.poll(cx, &mut reacher, &mut exposer, &mut to_exposer, &mut to_reacher)
                }
            });
            // Whether it did in time or not, both sockets are shut next.
            let _ = timeout(FAREWELL_LIMIT, other).await;
            tokio::join!(
                farewell(&mut reacher.io, &mut down, None),
                farewell(&mut exposer.io, &mut up, None)
            );
        }
        Ended::Vanished(_) | Ended::Violated(..) | Ended::Idle | Ended::Stopped(_) => {
            let (for_reacher, for_exposer) = ended.codes();
            tokio::join!(
                farewell(&mut reacher.io, &mut down, for_reacher),
                farewell(&mut exposer.io, &mut up, for_exposer)
            );
        }
    }
    ended
}

impl Ended {
    fn of(source: Side, end: FlowEnd) -> Self {
        match end {
            FlowEnd::Closed => Self::Closed(source),
            FlowEnd::SourceVanished => Self::Vanished(source),
            FlowEnd::SinkVanished => Self::Vanished(source.other()),
            FlowEnd::Violated(Violation(code)) => Self::Violated(source, code),
        }
    }

    /// What the reacher and the exposer are told.
    fn codes(self) -> (Option<u16>, Option<u16>) {
        let (side, code) = match self {
            Self::Closed(_) => return (None, None),
            Self::Vanished(side) => (side, None),
            Self::Violated(side, code) => (side, Some(code)),
            Self::Idle => return (Some(close::TIMEOUT), Some(close::TIMEOUT)),
            Self::Stopped(code) => return (Some(code), Some(code)),
        };
        match side {
            Side::Reacher => (code, Some(close::PEER_GONE)),
            Side::Exposer => (Some(close::PEER_GONE), code),
        }
    }
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Reacher => Self::Exposer,
            Self::Exposer => Self::Reacher,
        }
    }
}

/// Ends a data socket that never got to relay.
pub async fn refuse<T: AsyncRead + AsyncWrite + Unpin>(mut io: T, code: u16) {
    // Nothing was sent on it, so the encoding does not matter.
    let mut flow = Flow::new(Encoding::Base64, Side::Reacher, &Arc::default());
    farewell(&mut io, &mut flow, Some(code)).await;
}

/// Ends one socket so that nothing sent before is lost: says what is left and the close frame, shuts the
/// sending half, and reads on until the other end has shut its own, since a socket that is dropped
/// with unread bytes makes the kernel reset the connection under what was sent.
async fn farewell<T: AsyncRead + AsyncWrite + Unpin>(
    io: &mut T,
    flow: &mut Flow,
    code: Option<u16>,
) {
    let speak = async {
        if let Some(held) = flow.held.take() {
            io.write_all(&held.buffer[held.start..held.end]).await?;
        }
        // In the middle of a frame there is no place for another, and none after a close (RFC 6455
        // section 5.5.1), which may have been on its way when something else ended the tunnel.
        if let Some(code) = code
            && flow.translator.at_boundary()
            && !matches!(flow.ended, Some(FlowEnd::Closed))
        {
            let mut close = [0; MAX_HEAD_BYTES + 2];
            let mut output = Output { buffer: &mut close, length: 0 };
            output.put_control(Opcode::Close, &code.to_be_bytes());
            let length = output.length;
            io.write_all(&close[..length]).await?;
        }
        io.shutdown().await?;
        let mut unread = vec![0; 4096];
        while io.read(&mut unread).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    // A socket that fails or dawdles here is gone either way.
    let _ = timeout(FAREWELL_LIMIT, speak).await;
}

#[cfg(test)]
mod tests;
