//! One conversation between a reacher and an exposer about one service: its streams, their credit,
//! and whether the other side is alive. PROTOCOL.md, "Channel".
//!
//! A channel outlives tunnels. [`Channel::attach`] puts it on a new one, [`Channel::detach`] says that
//! the tunnel is lost; what the peer had not acknowledged by then is sent again on the next.
//!
//! Drive it so: give every decrypted record to [`Channel::handle_record`]; call
//! [`Channel::poll_transmit`] until it has nothing, whenever anything was called; call
//! [`Channel::handle_timeout`] at [`Channel::poll_timeout`]; take [`Channel::poll_event`] until empty.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use connect_spec::{
    limits::{CHANNEL_WINDOW, DEAD_AFTER, KEEPALIVE, MAX_CHECKS, MAX_DATA_BYTES, MAX_STREAMS},
    record::{
        self, CloseCode, End, Progress, Purpose, Record, RecordError, ResetCode,
        STREAMS_PER_PROGRESS, StreamId, StreamState,
    },
};

use super::stream::{RecvHalf, SendHalf};

/// An ACK that nothing else makes urgent waits this long for more bytes to acknowledge.
const ACK_DELAY: Duration = Duration::from_millis(20);

/// Records waiting to be said at which nothing more is heard: more than honest peers ever cause, whose
/// streams are at most [`MAX_STREAMS`]. A peer that asks and does not read fills no memory.
const MAX_OUTBOX: usize = 4 * MAX_STREAMS;

/// Pings in a row at the beginning of a tunnel: the shortest round trip bounds how far windows grow, and
/// the first ones wait for what else begins then.
const FIRST_PINGS: u32 = 16;

/// Bytes that one channel keeps for its peer, all streams together: what a peer that reads nothing can
/// make this agent hold.
const MAX_KEPT: usize = 16 * 1024 * 1024;

/// Which end of the channel this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Opens streams.
    Reacher,
    /// Accepts them.
    Exposer,
}

/// A rule that the peer broke; the channel is closed with [`CloseCode::Protocol`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer broke the protocol: {0}")]
pub(crate) struct ProtocolViolation(pub(super) &'static str);

/// Why a channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CloseReason {
    /// This side closed it.
    #[error("closed here")]
    Local,
    /// The other side closed it.
    #[error("closed by the peer: {0:?}")]
    Peer(CloseCode),
    /// The other side broke a rule.
    #[error(transparent)]
    Violation(#[from] ProtocolViolation),
    /// A record could not be read.
    #[error("the peer broke the protocol: {0}")]
    Record(#[from] RecordError),
    /// No tunnel came back in time.
    #[error("no tunnel came back in time")]
    Expired,
}

/// What the driver must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// HELLO and WELCOME are exchanged: the keys are confirmed.
    Established,
    /// The reacher opened a stream, for a purpose that is known.
    Incoming(StreamId, Purpose),
    /// A read that found nothing would find something, or the end.
    Readable(StreamId),
    /// A write that found no room would find some, or an error.
    Writable(StreamId),
    /// The peer answered a ping after this time.
    Ponged(Duration),
    /// The tunnel is of no more use: the peer closed it, or was silent for too long. The channel
    /// waits for the next.
    TunnelOver(Option<CloseCode>),
    /// The channel ended. The last event.
    Closed(CloseReason),
}

/// What a read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Read {
    /// At least one byte.
    Bytes(Bytes),
    /// The peer finished, and everything was read.
    Finished,
    /// Nothing yet; [`Event::Readable`] tells when.
    Blocked,
}

/// A stream that ended without a clean end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    /// One side reset the stream.
    #[error("stream was reset: {0:?}")]
    Reset(ResetCode),
    /// The channel under it ended.
    #[error("the channel is closed")]
    Closed,
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Channel {
    side: Side,
    phase: Phase,
    /// HELLO and WELCOME were exchanged on some tunnel: the peer knows the channel.
    is_known: bool,
    /// A tunnel was tried before.
    was_attached: bool,
    /// A stream was opened on a tunnel that never answered: the peer may know it, and may have passed
    /// on what it got.
    opened_early: bool,
    streams: BTreeMap<StreamId, Stream>,
    next_stream: StreamId,
    /// The part of the peer's list that has arrived.
    listed: Vec<StreamState>,
    /// Records other than DATA, FIN, ACK and stream WINDOW, in the order in which they go out.
    outbox: VecDeque<Outgoing>,
    /// Streams that may have bytes or FIN to send, in turn.
    sending: VecDeque<StreamId>,
    /// Streams that have an ACK or WINDOW to send now.
    feedback: BTreeSet<StreamId>,
    /// Streams whose ACK may wait until the deadline.
    delayed: BTreeSet<StreamId>,
    delayed_until: Option<Instant>,
    credit: Credit,
    /// Bytes that all streams keep until the peer has them.
    kept: usize,
    /// Streams whose writers wait for room.
    blocked_writers: BTreeSet<StreamId>,
    liveness: Liveness,
    events: VecDeque<Event>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No tunnel.
    Detached,
    /// The exposer waits for HELLO, the reacher for READY and WELCOME. `early`: the channel's first
    /// tunnel, on which the reacher need not wait to open streams and send.
    Greeting {
        ready: bool,
        early: bool,
    },
    Established,
    Closed,
}

#[derive(Debug, Clone)]
enum Outgoing {
    Greeting(Record<'static>),
    Open(StreamId, Purpose),
    Opened(StreamId),
    Reset { stream: StreamId, code: ResetCode, total: u64 },
    Ping(u64),
    Pong(u64),
    ChannelWindow,
    Close(CloseCode),
}

/// Credit of all streams together.
#[derive(Debug)]
struct Credit {
    /// Bytes that this side may send in all.
    peer_max: u64,
    /// Bytes that it sent.
    sent: u64,
    /// Bytes that the peer may send in all.
    max: u64,
    /// Bytes that the peer sent.
    received: u64,
    /// Bytes that applications here read or dropped.
    consumed: u64,
}

#[derive(Debug)]
struct Liveness {
    heard: Instant,
    /// When to ping next; not before the greeting is over.
    ping_at: Option<Instant>,
    ping: u64,
    ping_sent: Option<Instant>,
    /// The shortest on this tunnel.
    round_trip: Option<Duration>,
    /// Pings that were answered on this tunnel.
    answered: u32,
    jitter: Duration,
}

#[derive(Debug)]
struct Stream {
    purpose: Purpose,
    send: SendHalf,
    recv: RecvHalf,
    /// In the queue `sending`.
    queued: bool,
    reset: Option<ResetCode>,
    reset_sent: bool,
    reset_received: bool,
    /// The application let go of the stream.
    released: bool,
}

impl Stream {
    fn new(purpose: Purpose) -> Self {
        Self {
            purpose,
            send: SendHalf::new(),
            recv: RecvHalf::new(),
            queued: false,
            reset: None,
            reset_sent: false,
            reset_received: false,
            released: false,
        }
    }

    /// Nothing more will be sent or expected for this stream.
    fn is_done(&self) -> bool {
        let clean = self.send.is_done() && self.recv.is_done() && !self.recv.ack_due();
        let reset = self.reset_sent && (self.reset_received || self.recv.is_complete());
        clean || reset
    }
}

impl Channel {
    /// Begins a channel, on no tunnel yet.
    ///
    /// `jitter` is added to the keepalive interval, so that agents do not ping in step.
    pub(crate) fn new(side: Side, now: Instant, jitter: Duration) -> Self {
        Self {
            side,
            phase: Phase::Detached,
            is_known: false,
            was_attached: false,
            opened_early: false,
            streams: BTreeMap::new(),
            next_stream: StreamId::FIRST,
            listed: Vec::new(),
            outbox: VecDeque::new(),
            sending: VecDeque::new(),
            feedback: BTreeSet::new(),
            delayed: BTreeSet::new(),
            delayed_until: None,
            credit: Credit {
                peer_max: CHANNEL_WINDOW,
                sent: 0,
                max: CHANNEL_WINDOW,
                received: 0,
                consumed: 0,
            },
            kept: 0,
            blocked_writers: BTreeSet::new(),
            liveness: Liveness {
                heard: now,
                ping_at: None,
                ping: 0,
                ping_sent: None,
                round_trip: None,
                answered: 0,
                jitter,
            },
            events: VecDeque::new(),
        }
    }

    // How tunnels come and go.

    /// Puts the channel on a new tunnel; the reacher's HELLO is ready to be transmitted.
    pub(crate) fn attach(&mut self, now: Instant) {
        self.detach();
        if self.phase == Phase::Closed {
            return;
        }
        let early = self.side == Side::Reacher && !std::mem::replace(&mut self.was_attached, true);
        self.phase = Phase::Greeting { ready: false, early };
        self.liveness.heard = now;
        // Another way, another round trip.
        (self.liveness.round_trip, self.liveness.answered) = (None, 0);
        if self.side == Side::Exposer {
            return;
        }
        let new = !self.is_known && !self.opened_early;
        if early {
            let progress = Progress {
                next_stream: StreamId::FIRST,
                max_data: self.credit.max,
                received: 0,
                streams: Vec::new(),
                more: false,
            };
            self.outbox.push_back(Outgoing::Greeting(Record::Hello { new, progress }));
            let streams = self.streams.iter();
            self.outbox.extend(streams.map(|(id, stream)| Outgoing::Open(*id, stream.purpose)));
            self.queue_all();
        } else {
            let parts = self.progress(now).into_iter();
            self.outbox
                .extend(parts.map(|progress| Outgoing::Greeting(Record::Hello { new, progress })));
        }
    }

    /// The tunnel is lost. Streams stay as they are and wait for the next.
    pub(crate) fn detach(&mut self) {
        if self.phase == Phase::Closed {
            return;
        }
        self.phase = Phase::Detached;
        self.forget_tunnel();
        for stream in self.streams.values_mut() {
            stream.queued = false;
        }
    }

    /// Drops everything that was to be said over the tunnel.
    fn forget_tunnel(&mut self) {
        self.listed.clear();
        self.outbox.clear();
        self.sending.clear();
        self.feedback.clear();
        self.delayed.clear();
        self.delayed_until = None;
        self.liveness.ping_at = None;
    }

    /// No tunnel came back in time.
    pub(crate) fn expire(&mut self) {
        self.end(CloseReason::Expired, None);
    }

    /// When the peer was last heard of.
    pub(crate) fn heard(&self) -> Instant {
        self.liveness.heard
    }

    // What the application does.

    /// Opens a stream. Bytes may be written at once; they wait within the window for whoever reads them.
    ///
    /// # Errors
    /// [`StreamError`] when the channel is closed, or as many streams are open as may be.
    pub(crate) fn open(&mut self, purpose: Purpose) -> Result<StreamId, StreamError> {
        debug_assert_eq!(self.side, Side::Reacher, "only reachers open streams");
        if self.phase == Phase::Closed {
            return Err(StreamError::Closed);
        }
        if self.streams.len() >= MAX_STREAMS {
            return Err(StreamError::Reset(ResetCode::Busy));
        }
        let stream = self.next_stream;
        self.next_stream = stream.next().ok_or(StreamError::Closed)?;
        self.streams.insert(stream, Stream::new(purpose));
        self.say(Outgoing::Open(stream, purpose));
        Ok(stream)
    }

    /// The target of an incoming stream answered.
    pub(crate) fn opened(&mut self, stream: StreamId) {
        if self.streams.contains_key(&stream) {
            self.say(Outgoing::Opened(stream));
        }
    }

    /// How many bytes [`Channel::write`] would take; 0 asks for an [`Event::Writable`].
    pub(crate) fn room(&mut self, id: StreamId) -> Result<usize, StreamError> {
        let all = MAX_KEPT.saturating_sub(self.kept);
        let room = self.live(id)?.send.room().min(all);
        if room == 0 {
            self.blocked_writers.insert(id);
        }
        Ok(room)
    }

    /// Takes as many bytes as there is room for; 0 asks for an [`Event::Writable`].
    pub(crate) fn write(&mut self, id: StreamId, bytes: impl Buf) -> Result<usize, StreamError> {
        let taken = bytes.remaining().min(self.room(id)?);
        let stream = self.live(id)?;
        if stream.send.is_finished() {
            return Err(StreamError::Closed);
        }
        if taken > 0 {
            stream.send.write(bytes, taken);
            self.kept += taken;
            self.queue(id);
        }
        Ok(taken)
    }

    /// Ends this direction cleanly; the other goes on.
    pub(crate) fn finish(&mut self, id: StreamId) -> Result<(), StreamError> {
        self.live(id)?.send.finish();
        self.queue(id);
        Ok(())
    }

    /// Takes received bytes, at most `most`; [`Read::Blocked`] asks for an [`Event::Readable`].
    pub(crate) fn read(&mut self, id: StreamId, most: usize) -> Result<Read, StreamError> {
        let stream = self.live(id)?;
        let bytes = stream.recv.read(most);
        if bytes.is_empty() {
            if stream.recv.is_done() {
                return Ok(Read::Finished);
            }
            stream.recv.blocked = most > 0;
            return Ok(Read::Blocked);
        }
        if stream.recv.window_due() {
            self.feedback.insert(id);
        }
        self.consumed(bytes.len() as u64);
        Ok(Read::Bytes(bytes))
    }

    /// Ends both directions at once.
    pub(crate) fn reset(&mut self, id: StreamId, code: ResetCode) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.reset.is_none()
        {
            stream.reset = Some(code);
            self.send_reset(id, code);
            self.remove_if_done(id);
        }
    }

    /// The application lets go of a stream: one that it did not use to the end is reset.
    pub(crate) fn release(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.released = true;
        if !(stream.send.is_finished() && stream.recv.is_done()) {
            self.reset(id, ResetCode::Aborted);
        }
        self.remove_if_done(id);
    }

    /// Ends the channel and every stream in it; the record that says so is ready to be transmitted.
    pub(crate) fn close(&mut self, code: CloseCode) {
        self.end(CloseReason::Local, Some(code));
    }

    /// Streams that are open now.
    pub(crate) fn open_streams(&self) -> usize {
        self.streams.values().filter(|stream| !stream.released).count()
    }

    /// Streams that the application works on and that are not for the target.
    fn open_checks(&self) -> usize {
        let is_one = |stream: &&Stream| !stream.released && stream.purpose != Purpose::Target;
        self.streams.values().filter(is_one).count()
    }

    // What the tunnel does.

    /// Takes a decrypted record; what it brings for a stream is kept without a copy.
    pub(crate) fn handle_record(&mut self, now: Instant, bytes: &Bytes) {
        if self.phase == Phase::Closed {
            return;
        }
        self.liveness.heard = now;
        let handled = Record::decode(bytes)
            .map_err(CloseReason::from)
            .and_then(|record| self.dispatch(now, record, bytes));
        if let Err(reason) = handled {
            let answer = match reason {
                CloseReason::Violation(_) | CloseReason::Record(_) => Some(CloseCode::Protocol),
                CloseReason::Local | CloseReason::Peer(_) | CloseReason::Expired => None,
            };
            self.end(reason, answer);
        }
    }

    /// Takes note that the peer was heard, by a record that was not for the channel.
    pub(crate) fn hear(&mut self, now: Instant) {
        self.liveness.heard = now;
    }

    /// Ends the channel because of a record that was not for it.
    pub(crate) fn break_off(&mut self, violation: ProtocolViolation) {
        self.end(violation.into(), Some(CloseCode::Protocol));
    }

    /// Whether the greeting on this tunnel is still to come, or not over.
    pub(crate) fn is_greeting(&self) -> bool {
        matches!(self.phase, Phase::Greeting { .. })
    }

    /// Whether the greeting is over, and this side's last record of it transmitted.
    pub(crate) fn is_greeted(&self) -> bool {
        let said = !matches!(self.outbox.front(), Some(Outgoing::Greeting(_)));
        self.phase == Phase::Established && said
    }

    /// Appends the next plaintext record to seal and send to `record`; `false` when there is none.
    pub(crate) fn poll_transmit(&mut self, now: Instant, record: &mut Vec<u8>) -> bool {
        let greeted = match self.phase {
            Phase::Detached => return false,
            Phase::Greeting { early, .. } => early,
            Phase::Established | Phase::Closed => true,
        };
        // Until both sides have said how far they got, nothing else may go out.
        let may_go = |outgoing: &mut Outgoing| greeted || matches!(outgoing, Outgoing::Greeting(_));
        if let Some(outgoing) = self.outbox.pop_front_if(may_go) {
            self.encode(now, outgoing).encode(record);
            return true;
        }
        greeted && (self.transmit_feedback(now, record) || self.transmit_stream(record))
    }

    /// Whether [`Channel::poll_transmit`] may have something.
    pub(crate) fn wants_transmit(&self) -> bool {
        self.phase != Phase::Detached
            && !(self.outbox.is_empty() && self.sending.is_empty() && self.feedback.is_empty())
    }

    /// Whether the peer must take some of what is to be said before more of it is heard.
    pub(crate) fn is_backed_up(&self) -> bool {
        self.outbox.len() >= MAX_OUTBOX
    }

    /// When [`Channel::handle_timeout`] wants to be called, if nothing happens before.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        if matches!(self.phase, Phase::Detached | Phase::Closed) {
            return None;
        }
        let dead_at = self.liveness.heard + DEAD_AFTER;
        [self.delayed_until, self.liveness.ping_at, Some(dead_at)].into_iter().flatten().min()
    }

    /// Lets time pass.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Detached | Phase::Closed) {
            return;
        }
        if now >= self.liveness.heard + DEAD_AFTER {
            self.detach();
            self.events.push_back(Event::TunnelOver(None));
            return;
        }
        if self.delayed_until.is_some_and(|deadline| now >= deadline) {
            self.delayed_until = None;
            self.feedback.append(&mut self.delayed);
        }
        if self.liveness.ping_at.is_some_and(|ping_at| now >= ping_at) {
            self.ping(now);
        }
    }

    /// Asks the peer for a sign of life, on a tunnel that is greeted; [`Event::Ponged`] tells of it.
    pub(crate) fn ping(&mut self, now: Instant) {
        if self.phase != Phase::Established {
            return;
        }
        self.liveness.ping_at = Some(now + KEEPALIVE + self.liveness.jitter);
        self.liveness.ping += 1;
        self.liveness.ping_sent = Some(now);
        self.outbox.push_back(Outgoing::Ping(self.liveness.ping));
    }

    /// The next event.
    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    // How records are handled.

    /// Handles a record that was read from `whole`.
    fn dispatch(
        &mut self,
        now: Instant,
        record: Record<'_>,
        whole: &Bytes,
    ) -> Result<(), CloseReason> {
        match (self.phase, record) {
            (_, Record::ChannelClose(code)) => Err(CloseReason::Peer(code)),
            (_, Record::TunnelClose(code)) => {
                self.detach();
                self.events.push_back(Event::TunnelOver(Some(code)));
                Ok(())
            }
            (Phase::Greeting { ready, early }, record) => self.greet(now, ready, early, record),
            (_, Record::Open { stream, purpose }) => Ok(self.handle_open(stream, purpose)?),
            (_, Record::Opened(stream)) => Ok(self.handle_opened(stream)?),
            (_, Record::Data { stream, offset, bytes }) => {
                Ok(self.handle_data(now, stream, offset, whole.slice_ref(bytes))?)
            }
            (_, Record::Ack { stream, offset }) => Ok(self.handle_ack(stream, offset)?),
            (_, Record::Window { stream: None, max_data }) => {
                let before = self.credit.peer_max;
                self.credit.peer_max = before.max(max_data);
                if before == self.credit.sent {
                    self.queue_all();
                }
                Ok(())
            }
            (_, Record::Window { stream: Some(stream), max_data }) => {
                Ok(self.handle_window(stream, max_data)?)
            }
            (_, Record::Fin { stream, total }) => Ok(self.handle_fin(stream, total)?),
            (_, Record::Reset { stream, code, total }) => {
                Ok(self.handle_reset(stream, code, total)?)
            }
            (_, Record::Ping(value)) => {
                self.say(Outgoing::Pong(value));
                Ok(())
            }
            (_, Record::Pong(value)) => {
                self.handle_pong(now, value);
                Ok(())
            }
            (_, Record::Hello { .. } | Record::Welcome(_) | Record::Ready) => {
                Err(ProtocolViolation("a second greeting").into())
            }
            (_, Record::TrustGet(_) | Record::Trust { .. }) => {
                Err(ProtocolViolation("trust entries after the greeting").into())
            }
            // Those that come in their turn are for the machine of the tunnel.
            (
                _,
                Record::HsWant(_) | Record::Hs1 { .. } | Record::Hs2 { .. } | Record::Switch(_),
            ) => Err(ProtocolViolation("a rekey out of turn").into()),
        }
    }

    fn greet(
        &mut self,
        now: Instant,
        ready: bool,
        early: bool,
        record: Record<'_>,
    ) -> Result<(), CloseReason> {
        let progress = match (self.side, ready, record) {
            (Side::Exposer, _, Record::Hello { new: false, .. }) if !self.is_known => {
                // The channel that the reacher wants to carry on is not known here.
                self.end(CloseReason::Local, Some(CloseCode::Lost));
                return Ok(());
            }
            (Side::Reacher, false, Record::Ready) => {
                self.phase = Phase::Greeting { ready: true, early };
                return Ok(());
            }
            (Side::Exposer, _, Record::Hello { progress, .. })
            | (Side::Reacher, true, Record::Welcome(progress)) => progress,
            _ => return Err(ProtocolViolation("a record before the greeting").into()),
        };
        let in_order = match (self.listed.last(), progress.streams.first()) {
            (Some(last), Some(first)) => last.stream < first.stream,
            _ => true,
        };
        if !in_order || self.listed.len() + progress.streams.len() > MAX_STREAMS {
            return Err(ProtocolViolation("a list of streams that makes no sense").into());
        }
        self.listed.extend(&progress.streams);
        if progress.more {
            return Ok(());
        }
        let listed = std::mem::take(&mut self.listed);
        self.credit.peer_max = self.credit.peer_max.max(progress.max_data);
        // What was said early goes on as it is; otherwise both sides say again what is missing.
        if !early {
            self.resume(progress.next_stream, progress.received, &listed)?;
        }
        if self.side == Side::Exposer {
            let parts = self.progress(now);
            let welcome = parts.into_iter().map(|part| Outgoing::Greeting(Record::Welcome(part)));
            let missing = std::mem::take(&mut self.outbox);
            self.outbox.push_back(Outgoing::Greeting(Record::Ready));
            self.outbox.extend(welcome.chain(missing));
        }
        self.phase = Phase::Established;
        self.is_known = true;
        self.events.push_back(Event::Established);
        self.wake_writers();
        self.queue_all();
        self.ping(now);
        Ok(())
    }

    /// Goes back to what the peer says it has. PROTOCOL.md, "Resume".
    fn resume(
        &mut self,
        peer_next: StreamId,
        received: u64,
        listed: &[StreamState],
    ) -> Result<(), ProtocolViolation> {
        let mut to_send_again = 0;
        let listed: BTreeMap<_, _> = listed.iter().map(|state| (state.stream, state)).collect();
        if self.side == Side::Reacher && peer_next > self.next_stream {
            return Err(ProtocolViolation("streams that were never opened"));
        }
        // Streams that the peer does not know yet are opened again, before anything is said of them.
        self.outbox.retain(|outgoing| !matches!(outgoing, Outgoing::Open(..)));
        let mut said = std::mem::take(&mut self.outbox);
        said.retain(
            |outgoing| !matches!(outgoing, Outgoing::Reset { stream, .. } if *stream >= peer_next),
        );
        let ids: Vec<_> = self.streams.keys().copied().collect();
        let (known, unknown) = ids.split_at(ids.partition_point(|id| *id < peer_next));
        for id in unknown {
            let Some(stream) = self.streams.get_mut(id) else { continue };
            if self.side == Side::Exposer {
                return Err(ProtocolViolation("a stream that its opener does not know"));
            }
            if stream.reset.is_some() {
                self.settle(*id);
                continue;
            }
            stream.send.resume(0)?;
            to_send_again += stream.send.charged();
            self.outbox.push_back(Outgoing::Open(*id, stream.purpose));
        }
        self.outbox.extend(said);
        for id in known {
            match listed.get(id) {
                Some(state) => to_send_again += self.resume_stream(*id, state)?,
                None => self.settle(*id),
            }
        }
        // Bytes of streams that are over were charged, and may never have arrived.
        let sent = received.saturating_add(to_send_again);
        if sent > self.credit.sent {
            return Err(ProtocolViolation("received more than was sent"));
        }
        self.credit.sent = sent;
        Ok(())
    }

    /// Returns how many bytes the peer was not told of yet, and will be: by DATA, or by a RESET.
    fn resume_stream(
        &mut self,
        id: StreamId,
        state: &StreamState,
    ) -> Result<u64, ProtocolViolation> {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Ok(0);
        };
        let to_tell = stream.send.charged().saturating_sub(state.received);
        if stream.reset.is_none() {
            let kept = stream.send.kept();
            stream.send.resume(state.received)?;
            self.kept -= kept - stream.send.kept();
            stream.send.handle_window(state.max_data);
        }
        if let Some(End::Reset(total)) = state.end {
            self.handle_reset(id, ResetCode::Aborted, total)?;
        } else if let Some(code) = self.streams.get(&id).and_then(|stream| stream.reset) {
            // The peer may not have heard of it.
            self.repeat_reset(id, code);
        }
        Ok(to_tell)
    }

    /// The peer is done with a stream: it has everything, or it gave up.
    fn settle(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        (stream.reset_sent, stream.reset_received) = (true, true);
        self.kept -= stream.send.discard();
        // A peer forgets a stream that nobody reset only when it has every byte: what was on its way
        // when the tunnel was lost, and its acknowledgement, do not matter any more.
        if stream.reset.is_none() && stream.send.is_finished() && stream.recv.is_complete() {
            stream.send.settle();
        } else if stream.reset.is_none() {
            stream.reset = Some(ResetCode::Lost);
            let dropped = stream.recv.discard();
            self.events.extend([Event::Readable(id), Event::Writable(id)]);
            self.consumed(dropped);
        }
        self.remove_if_done(id);
    }

    /// How far this side got, as HELLO and WELCOME say it; counts as acknowledged and granted from
    /// here on.
    fn progress(&mut self, now: Instant) -> Vec<Progress> {
        let mut states = Vec::with_capacity(self.streams.len());
        for (id, stream) in &mut self.streams {
            let end = if stream.reset.is_some() {
                Some(End::Reset(stream.send.charged()))
            } else {
                stream.send.final_size().map(End::Fin)
            };
            states.push(StreamState {
                stream: *id,
                received: stream.recv.take_ack(),
                max_data: stream.recv.take_window(now, None),
                end,
            });
        }
        let part = |streams: &[StreamState], more| Progress {
            next_stream: self.next_stream,
            max_data: self.credit.max,
            received: self.credit.received,
            streams: streams.to_vec(),
            more,
        };
        let mut parts: Vec<_> =
            states.chunks(STREAMS_PER_PROGRESS).map(|streams| part(streams, true)).collect();
        match parts.last_mut() {
            Some(last) => last.more = false,
            None => parts.push(part(&[], false)),
        }
        parts
    }

    fn handle_open(&mut self, stream: StreamId, purpose: Purpose) -> Result<(), ProtocolViolation> {
        // A stream that was reset before the exposer knew of it is never opened: numbers may be skipped.
        if self.side == Side::Reacher || stream < self.next_stream {
            return Err(ProtocolViolation("a stream opened out of turn"));
        }
        self.next_stream = stream.next().ok_or(ProtocolViolation("no stream is left"))?;
        self.streams.insert(stream, Stream::new(purpose));
        let refused = match purpose {
            Purpose::Target => self.streams.len() > MAX_STREAMS,
            Purpose::Check | Purpose::Sink | Purpose::Source => {
                self.streams.len() > MAX_STREAMS || self.open_checks() > MAX_CHECKS
            }
            Purpose::Other(_) => {
                self.reset(stream, ResetCode::UnknownPurpose);
                self.release(stream);
                return Ok(());
            }
        };
        if refused {
            self.reset(stream, ResetCode::Busy);
            self.release(stream);
        } else {
            self.events.push_back(Event::Incoming(stream, purpose));
        }
        Ok(())
    }

    fn handle_opened(&mut self, stream: StreamId) -> Result<(), ProtocolViolation> {
        let in_turn = self.side == Side::Reacher && stream < self.next_stream;
        if in_turn { Ok(()) } else { Err(ProtocolViolation("a stream opened by the wrong side")) }
    }

    fn handle_data(
        &mut self,
        now: Instant,
        id: StreamId,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), ProtocolViolation> {
        let Some(stream) = self.known(id)? else {
            return Ok(());
        };
        let fresh = stream.recv.handle_data(offset, bytes)?;
        let urgent = stream.recv.ack_urgent();
        let wake = std::mem::take(&mut stream.recv.blocked);
        let dropped = stream.recv.waiting() == 0;
        if urgent {
            self.feedback.insert(id);
        } else {
            self.delayed.insert(id);
            self.delayed_until.get_or_insert(now + ACK_DELAY);
        }
        if wake {
            self.events.push_back(Event::Readable(id));
        }
        self.received(fresh)?;
        if dropped {
            self.consumed(fresh);
        }
        Ok(())
    }

    fn handle_ack(&mut self, id: StreamId, offset: u64) -> Result<(), ProtocolViolation> {
        if let Some(stream) = self.known(id)? {
            let kept = stream.send.kept();
            stream.send.handle_ack(offset)?;
            let freed = kept - stream.send.kept();
            self.kept -= freed;
            self.wake_writers();
            self.remove_if_done(id);
        }
        Ok(())
    }

    fn handle_window(&mut self, id: StreamId, max_data: u64) -> Result<(), ProtocolViolation> {
        if let Some(stream) = self.known(id)? {
            stream.send.handle_window(max_data);
            self.queue(id);
            self.wake_writers();
        }
        Ok(())
    }

    fn handle_fin(&mut self, id: StreamId, total: u64) -> Result<(), ProtocolViolation> {
        let Some(stream) = self.known(id)? else {
            return Ok(());
        };
        if stream.recv.handle_end(total)? != 0 {
            return Err(ProtocolViolation("FIN before the last byte"));
        }
        if std::mem::take(&mut stream.recv.blocked) {
            self.events.push_back(Event::Readable(id));
        }
        self.feedback.insert(id);
        Ok(())
    }

    fn handle_reset(
        &mut self,
        id: StreamId,
        code: ResetCode,
        total: u64,
    ) -> Result<(), ProtocolViolation> {
        let Some(stream) = self.known(id)? else {
            return Ok(());
        };
        let dropped = stream.recv.waiting() as u64;
        let missing = stream.recv.handle_reset(total)?;
        stream.reset_received = true;
        if stream.reset.is_none() {
            stream.reset = Some(code);
            self.events.extend([Event::Readable(id), Event::Writable(id)]);
        }
        self.received(missing)?;
        self.consumed(missing + dropped);
        // Both sides learn the other's final size, which counts in the credit of the channel.
        self.send_reset(id, code);
        self.remove_if_done(id);
        Ok(())
    }

    fn handle_pong(&mut self, now: Instant, value: u64) {
        if value != self.liveness.ping {
            return;
        }
        if let Some(sent) = self.liveness.ping_sent.take() {
            let round_trip = now.duration_since(sent);
            let least = self.liveness.round_trip.map_or(round_trip, |least| least.min(round_trip));
            self.liveness.round_trip = Some(least);
            self.events.push_back(Event::Ponged(round_trip));
            self.liveness.answered += 1;
            if self.liveness.answered < FIRST_PINGS {
                self.ping(now);
            }
        }
    }

    // How records are made.

    fn encode(&mut self, now: Instant, outgoing: Outgoing) -> Record<'static> {
        match outgoing {
            Outgoing::Greeting(record) => record,
            Outgoing::Open(stream, purpose) => {
                self.opened_early |= !self.is_known;
                Record::Open { stream, purpose }
            }
            Outgoing::Opened(stream) => Record::Opened(stream),
            Outgoing::Reset { stream, code, total } => Record::Reset { stream, code, total },
            Outgoing::Ping(value) => {
                self.liveness.ping_sent = Some(now);
                Record::Ping(value)
            }
            Outgoing::Pong(value) => Record::Pong(value),
            Outgoing::ChannelWindow => Record::Window { stream: None, max_data: self.credit.max },
            Outgoing::Close(code) => Record::ChannelClose(code),
        }
    }

    fn transmit_feedback(&mut self, now: Instant, record: &mut Vec<u8>) -> bool {
        let round_trip = self.liveness.round_trip;
        while let Some(id) = self.feedback.first().copied() {
            // A reset stream needs neither: its final sizes say all.
            if let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.reset.is_none())
            {
                if stream.recv.ack_due() {
                    let offset = stream.recv.take_ack();
                    self.delayed.remove(&id);
                    Record::Ack { stream: id, offset }.encode(record);
                    return true;
                }
                if stream.recv.window_due() {
                    let max_data = stream.recv.take_window(now, round_trip);
                    Record::Window { stream: Some(id), max_data }.encode(record);
                    return true;
                }
            }
            self.feedback.remove(&id);
            self.remove_if_done(id);
        }
        false
    }

    fn transmit_stream(&mut self, record: &mut Vec<u8>) -> bool {
        while let Some(id) = self.sending.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else {
                continue;
            };
            stream.queued = false;
            if stream.reset.is_some() {
                continue;
            }
            let credit = self.credit.peer_max - self.credit.sent;
            let length = stream.send.sendable(credit).min(MAX_DATA_BYTES);
            if length > 0 {
                record::begin_data(record, id, stream.send.sent(), length);
                self.credit.sent += stream.send.take(length, record);
                record::end_data(record, length);
                let woken = stream.send.worth_waking() && self.kept < MAX_KEPT;
                if woken && self.blocked_writers.remove(&id) {
                    self.events.push_back(Event::Writable(id));
                }
                self.queue(id);
                return true;
            }
            if let Some(total) = stream.send.take_fin() {
                Record::Fin { stream: id, total }.encode(record);
                return true;
            }
        }
        false
    }

    // Book-keeping.

    /// A stream that the application may use.
    fn live(&mut self, id: StreamId) -> Result<&mut Stream, StreamError> {
        let stream = self.streams.get_mut(&id).ok_or(StreamError::Closed)?;
        match stream.reset {
            Some(code) => Err(StreamError::Reset(code)),
            None => Ok(stream),
        }
    }

    /// A stream that the peer may speak of; `None` when both sides are done with it.
    fn known(&mut self, id: StreamId) -> Result<Option<&mut Stream>, ProtocolViolation> {
        if id >= self.next_stream {
            return Err(ProtocolViolation("a stream that was never opened"));
        }
        Ok(self.streams.get_mut(&id))
    }

    fn queue(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            let credit = self.credit.peer_max - self.credit.sent;
            let work = stream.send.sendable(credit) > 0 || stream.send.fin_due();
            if work && !stream.queued {
                stream.queued = true;
                self.sending.push_back(id);
            }
        }
    }

    fn queue_all(&mut self) {
        let ids: Vec<_> = self.streams.keys().copied().collect();
        for id in ids {
            self.queue(id);
        }
    }

    /// Tells the writers that wait, if there is room for them.
    fn wake_writers(&mut self) {
        if self.kept >= MAX_KEPT {
            return;
        }
        let streams = &self.streams;
        let woken = self.blocked_writers.extract_if(.., |id| {
            streams
                .get(id)
                .is_none_or(|stream| stream.reset.is_some() || stream.send.worth_waking())
        });
        self.events.extend(woken.map(Event::Writable));
    }

    fn received(&mut self, fresh: u64) -> Result<(), ProtocolViolation> {
        self.credit.received += fresh;
        if self.credit.received > self.credit.max {
            return Err(ProtocolViolation("bytes beyond the channel's credit"));
        }
        Ok(())
    }

    fn consumed(&mut self, bytes: u64) {
        self.credit.consumed += bytes;
        if self.credit.consumed + CHANNEL_WINDOW - self.credit.max >= CHANNEL_WINDOW / 4 {
            self.credit.max = self.credit.consumed + CHANNEL_WINDOW;
            self.say(Outgoing::ChannelWindow);
        }
    }

    /// Sends RESET once, and drops what the application would still have read.
    fn send_reset(&mut self, id: StreamId, code: ResetCode) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.reset_sent {
            return;
        }
        stream.reset_sent = true;
        self.kept -= stream.send.discard();
        let dropped = stream.recv.discard();
        self.consumed(dropped);
        self.repeat_reset(id, code);
    }

    fn repeat_reset(&mut self, id: StreamId, code: ResetCode) {
        if let Some(stream) = self.streams.get(&id) {
            let total = stream.send.charged();
            self.say(Outgoing::Reset { stream: id, code, total });
        }
    }

    /// Queues a record; without a tunnel, the greeting of the next one says it.
    fn say(&mut self, outgoing: Outgoing) {
        if self.phase != Phase::Detached {
            self.outbox.push_back(outgoing);
        }
    }

    fn remove_if_done(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(|stream| stream.released && stream.is_done()) {
            self.streams.remove(&id);
            self.feedback.remove(&id);
            self.delayed.remove(&id);
        }
    }

    fn end(&mut self, reason: CloseReason, say: Option<CloseCode>) {
        if self.phase == Phase::Closed {
            return;
        }
        self.phase = Phase::Closed;
        self.forget_tunnel();
        self.blocked_writers.clear();
        self.kept = 0;
        for (id, _) in std::mem::take(&mut self.streams) {
            self.events.extend([Event::Readable(id), Event::Writable(id)]);
        }
        self.outbox.extend(say.map(Outgoing::Close));
        self.events.push_back(Event::Closed(reason));
    }
}

#[cfg(test)]
#[path = "channel/tests.rs"]
mod tests;
#[cfg(test)]
#[path = "channel/vectors.rs"]
mod vectors;
