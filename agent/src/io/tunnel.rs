//! Drives a channel over one data socket after the other, and lends its streams to the rest of the
//! program.
//!
//! One task per tunnel reads, opens, seals and writes; streams touch the channel under its lock and
//! wake that task. Nothing here waits while it holds the lock.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use connect_crypto::transport::{Opener, Sealer, Transport};
use connect_spec::{
    control::TICKET_SCHEME,
    control::{TUNNEL_PATH, Ticket},
    encoding::Encoding,
    limits::DEAD_AFTER,
    record::{CloseCode, Purpose, Record, ResetCode, StreamId},
};
use http::{
    HeaderValue,
    header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, watch},
    time::{Sleep, sleep_until, timeout, timeout_at},
};

use super::{
    dial::HubUrl,
    packets::{PacketError, PacketSocket},
};
use crate::{
    engine::{
        channel::{Channel, CloseReason, Event, Read, Side, StreamError},
        rekey::{Opened, Rekey, RekeyAfter, RekeyEnd, Role},
    },
    error::Result,
    random,
};

/// Keepalives are spread over this much time.
const JITTER_MILLIS: u32 = 3000;
/// How long the last records of a closing tunnel may take.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// One end of a tunnel: a data socket and the keys for it.
pub(crate) struct TunnelEnd {
    socket: PacketSocket,
    sealer: Sealer,
    opener: Opener,
    rekey: Rekey<Transport>,
}

impl TunnelEnd {
    /// Opens the data socket of one end of a tunnel, whose first keys are in `transport`.
    ///
    /// # Errors
    /// As [`HubUrl::open`].
    pub(crate) async fn open(
        hub: &HubUrl,
        ticket: &Ticket,
        encoding: Encoding,
        transport: Transport,
        role: Role<Transport>,
        rekey_after: RekeyAfter,
    ) -> Result<Self> {
        let hash = transport.handshake_hash();
        let rekey = Rekey::new(role, rekey_after, random::number(), Instant::now(), hash);
        let mut authorization =
            HeaderValue::try_from(format!("{TICKET_SCHEME} {}", ticket.reveal()))
                .expect("a ticket is hex");
        authorization.set_sensitive(true);
        let headers = [
            (AUTHORIZATION, authorization),
            (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(encoding.subprotocol())),
        ];
        let (io, early) = hub.open_stream(TUNNEL_PATH, &headers).await?;
        let (sealer, opener) = transport.split();
        Ok(Self { socket: PacketSocket::new(io, early, encoding), sealer, opener, rekey })
    }

    /// Reads one record before the channel is put on the tunnel. The first one confirms that the peer
    /// has the keys.
    ///
    /// # Errors
    /// [`End`] when the socket ends before, or the record does not open.
    pub(crate) async fn read_record(&mut self) -> std::result::Result<Bytes, End> {
        Ok(self.socket.receive(&mut self.opener).await?)
    }

    /// Sends one record before the channel is put on the tunnel.
    ///
    /// # Errors
    /// [`End`] when the socket fails.
    pub(crate) async fn send_record(
        &mut self,
        record: &Record<'_>,
    ) -> std::result::Result<(), End> {
        let compose = |out: &mut Vec<u8>| {
            record.encode(out);
            true
        };
        self.socket
            .queue(&mut self.sealer, compose)
            .map_err(|error| End::Socket(error.to_string()))?;
        self.socket.flush().await.map_err(|error| End::Socket(error.to_string()))
    }

    /// Closes the tunnel with a word to the peer; the channel it was for is none of its business.
    pub(crate) async fn refuse(mut self, code: CloseCode) {
        let say = async {
            // A peer that is gone needs no word.
            let _ = self.send_record(&Record::TunnelClose(code)).await;
            let _ = self.socket.close().await;
        };
        // A peer that does not read it cannot hold us.
        let _ = timeout(CLOSE_TIMEOUT, say).await;
    }
}

/// How a channel is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// On no tunnel; waiting for the next.
    Detached,
    /// Waiting for HELLO or WELCOME.
    Greeting,
    /// Keys are confirmed; `round_trip` is there once an encrypted ping was answered.
    Established { round_trip: Option<Duration> },
    /// Over, and the last record is sent.
    Closed,
}

/// Why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    /// The channel ended.
    #[error(transparent)]
    Channel(#[from] CloseReason),
    /// The peer closed the tunnel but not the channel.
    #[error("the peer closed the tunnel: {0:?}")]
    Peer(CloseCode),
    /// Nothing was heard for too long.
    #[error("the peer has been silent for {} s", DEAD_AFTER.as_secs())]
    Silent,
    /// A newer tunnel of the channel took over.
    #[error("a newer tunnel took over")]
    Replaced,
    /// The data socket ended without a close record.
    #[error("the data connection was lost: {0}")]
    Socket(String),
    /// Its keys were not replaced when they had to be.
    #[error(transparent)]
    Rekey(#[from] RekeyEnd),
    /// A packet did not open: it was changed on the way, or made up.
    #[error("a packet was altered on the way")]
    Tampered,
}

impl From<PacketError> for End {
    fn from(error: PacketError) -> Self {
        match error {
            PacketError::Socket(cause) => Self::Socket(cause),
            PacketError::Tampered => Self::Tampered,
        }
    }
}

/// One channel; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct ChannelHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    status: watch::Sender<Status>,
    /// Number of the tunnel that the channel is on; changes when a newer one takes over.
    tunnel: watch::Sender<u64>,
    /// How often the keys of a tunnel were replaced while the channel was on it.
    rekeys: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    channel: Channel,
    /// The task of the tunnel that the channel is on.
    driver: Option<Waker>,
    wakers: BTreeMap<StreamId, Wakers>,
    /// Where incoming streams go; `None` for a reacher.
    incoming: Option<mpsc::UnboundedSender<(StreamId, Purpose)>>,
    ended: Option<CloseReason>,
    /// The tunnel is of no more use, for this reason.
    over: Option<Option<CloseCode>>,
}

impl Inner {
    /// The channel ended, or the tunnel is of no more use.
    fn is_over(&self) -> bool {
        self.ended.is_some() || self.over.is_some()
    }
}

#[derive(Debug, Default)]
struct Wakers {
    read: Option<Waker>,
    write: Option<Waker>,
}

impl ChannelHandle {
    /// The reacher's side.
    pub(crate) fn reacher() -> Self {
        Self::new(Side::Reacher, None)
    }

    /// The exposer's side, and the streams that the reacher opens. Their number is bounded by the
    /// channel, so the queue of them is too.
    pub(crate) fn exposer() -> (Self, mpsc::UnboundedReceiver<(StreamId, Purpose)>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self::new(Side::Exposer, Some(sender)), receiver)
    }

    fn new(side: Side, incoming: Option<mpsc::UnboundedSender<(StreamId, Purpose)>>) -> Self {
        let jitter = Duration::from_millis((random::number() % JITTER_MILLIS).into());
        Self(Arc::new(Shared {
            inner: Mutex::new(Inner {
                channel: Channel::new(side, Instant::now(), jitter),
                driver: None,
                wakers: BTreeMap::new(),
                incoming,
                ended: None,
                over: None,
            }),
            status: watch::Sender::new(Status::Detached),
            tunnel: watch::Sender::new(0),
            rekeys: AtomicU64::new(0),
        }))
    }

    /// Opens a stream. For [`Purpose::Target`] the exposer dials while the first bytes already travel.
    ///
    /// # Errors
    /// [`StreamError`] when the channel is over or full.
    pub(crate) fn open_stream(&self, purpose: Purpose) -> std::result::Result<Stream, StreamError> {
        let id = self.with(|channel| channel.open(purpose))?;
        Ok(Stream { channel: self.clone(), id })
    }

    /// Takes over a stream that the reacher opened.
    pub(crate) fn incoming_stream(&self, id: StreamId) -> Stream {
        Stream { channel: self.clone(), id }
    }

    /// Ends the channel and says why.
    pub(crate) fn close(&self, code: CloseCode) {
        self.with(|channel| channel.close(code));
    }

    /// Streams that are open now.
    pub(crate) fn open_streams(&self) -> usize {
        self.lock().channel.open_streams()
    }

    /// How often the keys of the channel's tunnels were replaced, the first keys of each not counted.
    pub(crate) fn rekeys(&self) -> u64 {
        self.0.rekeys.load(Ordering::Relaxed)
    }

    /// How the channel is doing, as it changes.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.0.status.subscribe()
    }

    /// Waits until the peer answered an encrypted ping over the tunnel that is up.
    pub(crate) async fn answered(&self) {
        self.reaches(|status| matches!(status, Status::Established { round_trip: Some(_) })).await;
    }

    /// Waits until the peer confirmed its keys on the tunnel that is up.
    pub(crate) async fn confirmed(&self) {
        self.reaches(|status| matches!(status, Status::Established { .. })).await;
    }

    /// Sends an encrypted ping and waits for its answer, on whatever tunnel is up by then.
    pub(crate) async fn ping(&self) -> Duration {
        let mut status = self.status();
        status.mark_unchanged();
        self.with(|channel| channel.ping(Instant::now()));
        loop {
            // The sender lives as long as this handle. What a tunnel that is lost does not answer, the pings
            // after the next greeting do.
            let _ = status.changed().await;
            if let Status::Established { round_trip: Some(round_trip) } =
                *status.borrow_and_update()
            {
                return round_trip;
            }
        }
    }

    /// The last round trip over the tunnel that is up.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        match *self.0.status.borrow() {
            Status::Established { round_trip } => round_trip,
            Status::Detached | Status::Greeting | Status::Closed => None,
        }
    }

    async fn reaches(&self, is_it: impl FnMut(&Status) -> bool) {
        // The sender lives as long as this handle.
        let _ = self.status().wait_for(is_it).await;
    }

    /// When the peer was last heard of.
    pub(crate) fn heard(&self) -> Instant {
        self.lock().channel.heard()
    }

    /// Ends the channel when it has been on no tunnel, and its peer not heard of, for `limit`.
    /// Returns when the channel is over.
    pub(crate) async fn expire_after(&self, limit: Duration) {
        let mut status = self.status();
        loop {
            let parked = |status: &Status| matches!(status, Status::Detached | Status::Closed);
            // The sender lives as long as this handle.
            if status.wait_for(parked).await.is_ok_and(|status| *status == Status::Closed) {
                return;
            }
            let deadline = tokio::time::Instant::from(self.heard() + limit);
            let moved = status.wait_for(|status| *status != Status::Detached);
            if timeout_at(deadline, moved).await.is_err() {
                self.with(Channel::expire);
            }
        }
    }

    /// Waits until the channel is over and its last record sent.
    pub(crate) async fn closed(&self) {
        self.reaches(|status| *status == Status::Closed).await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere cannot leave the channel in a worse state than a lost tunnel.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` on the channel, then tells whom its effects concern.
    fn with<T>(&self, act: impl FnOnce(&mut Channel) -> T) -> T {
        let mut inner = self.lock();
        let result = act(&mut inner.channel);
        self.after(inner);
        result
    }

    fn after(&self, mut inner: MutexGuard<'_, Inner>) {
        self.tell(&mut inner);
        if inner.channel.wants_transmit() || inner.is_over() {
            let driver = inner.driver.take();
            drop(inner);
            if let Some(driver) = driver {
                driver.wake();
            }
        }
    }

    /// Tells everybody but the tunnel's task.
    fn tell(&self, inner: &mut Inner) {
        while let Some(event) = inner.channel.poll_event() {
            self.dispatch(inner, event);
        }
    }

    fn dispatch(&self, inner: &mut Inner, event: Event) {
        match event {
            Event::Established => {
                self.0.status.send_replace(Status::Established { round_trip: None });
            }
            Event::Ponged(round_trip) => {
                self.0.status.send_replace(Status::Established { round_trip: Some(round_trip) });
            }
            Event::Incoming(stream, purpose) => {
                let incoming = inner.incoming.as_ref();
                let sent = incoming.map(|incoming| incoming.send((stream, purpose)));
                if !matches!(sent, Some(Ok(()))) {
                    inner.channel.release(stream);
                }
            }
            Event::Readable(stream) => {
                if let Some(waker) = inner.wakers.get_mut(&stream).and_then(|w| w.read.take()) {
                    waker.wake();
                }
            }
            Event::Writable(stream) => {
                if let Some(waker) = inner.wakers.get_mut(&stream).and_then(|w| w.write.take()) {
                    waker.wake();
                }
            }
            Event::Closed(reason) => {
                tracing::debug!(%reason, "channel closed");
                inner.incoming = None;
                inner.ended = Some(reason);
                // On a tunnel, the last record is still to be sent.
                self.0.status.send_if_modified(|status| {
                    let detached = *status == Status::Detached;
                    if detached {
                        *status = Status::Closed;
                    }
                    detached
                });
            }
            Event::TunnelOver(code) => inner.over = Some(code),
        }
    }

    /// Puts the channel on a tunnel and runs it until the tunnel ends. A tunnel that it was on before
    /// is dropped at once. `first` is a record that was read already.
    pub(crate) async fn run(&self, mut end: TunnelEnd, first: Option<Bytes>) -> End {
        let mut newest = self.0.tunnel.subscribe();
        let number = {
            let mut inner = self.lock();
            if let Some(reason) = inner.ended {
                return End::Channel(reason);
            }
            let now = Instant::now();
            inner.over = None;
            inner.channel.attach(now);
            self.0.status.send_replace(Status::Greeting);
            self.0.tunnel.send_modify(|number| *number += 1);
            let number = *self.0.tunnel.borrow();
            if let Some(first) = first {
                inner.channel.handle_record(now, &first);
            }
            self.after(inner);
            number
        };
        let _attached = Attached { channel: self, number };
        let ended = tokio::select! {
            ended = self.drive(number, &mut end) => ended,
            _ = newest.wait_for(|newest| *newest != number) => End::Replaced,
        };
        let inner = self.lock();
        if *self.0.tunnel.borrow() != number {
            return ended;
        }
        match (ended, inner.ended, inner.over) {
            // The record that says why came just before the socket ended.
            (End::Socket(_), Some(reason), _) => End::Channel(reason),
            (End::Socket(_), None, Some(Some(code))) => End::Peer(code),
            (ended, _, _) => ended,
        }
    }

    /// Moves records between socket and channel until the tunnel ends.
    async fn drive(&self, number: u64, end: &mut TunnelEnd) -> End {
        let mut timer = pin!(Timer::new());
        let ended = poll_fn(|cx| {
            if timer.as_mut().poll_expired(cx) {
                end.socket.rest();
                self.with(|channel| channel.handle_timeout(Instant::now()));
            }
            if let Poll::Ready(ended) = self.poll_turn(cx, number, end) {
                return Poll::Ready(ended);
            }
            let inner = self.lock();
            let rekey = end.rekey.poll_timeout(inner.channel.is_greeted());
            let deadline = inner.channel.poll_timeout().map_or(rekey, |at| at.min(rekey));
            drop(inner);
            timer.as_mut().set(cx, deadline);
            Poll::Pending
        })
        .await;
        let said = matches!(ended, End::Channel(_) | End::Peer(_) | End::Silent | End::Rekey(_));
        if said || end.socket.is_closed() {
            // The last record is on its way, or a close to be answered (RFC 6455 section 5.5.1); a peer that
            // does not read it cannot hold us.
            let _ = timeout(CLOSE_TIMEOUT, end.socket.close()).await;
        }
        ended
    }

    /// Hands a record to the machine that it is for; an end is that of the tunnel.
    fn take_record(&self, number: u64, end: &mut TunnelEnd, record: &Bytes) -> Option<End> {
        let now = Instant::now();
        // Not under the lock of the channel: a handshake takes longer than streams should wait.
        let greeted = !self.lock().channel.is_greeting();
        let opened = end.rekey.opened(now, greeted, record);
        let mut inner = self.lock();
        if *self.0.tunnel.borrow() != number {
            return Some(End::Replaced);
        }
        match opened {
            Ok(Opened::ForChannel) => inner.channel.handle_record(now, record),
            Ok(Opened::Taken) => inner.channel.hear(now),
            Ok(Opened::Switched(next)) => {
                end.opener = next;
                inner.channel.hear(now);
                let rekeys = self.0.rekeys.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::debug!(tunnel = number, rekeys, "the peer uses new keys");
            }
            Err(violation) => inner.channel.break_off(violation),
        }
        self.tell(&mut inner);
        None
    }

    /// One read, and what follows from it; one write. Streams get their turn after each.
    fn poll_turn(&self, cx: &mut Context<'_>, number: u64, end: &mut TunnelEnd) -> Poll<End> {
        let filled = if self.lock().channel.is_backed_up() {
            Poll::Pending
        } else {
            end.socket.poll_fill(cx)
        };
        let read = match filled {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
            Poll::Pending => false,
        };
        loop {
            let record = match end.socket.next_record(&mut end.opener) {
                Ok(Some(record)) => record,
                Ok(None) => break,
                Err(error) => return Poll::Ready(error.into()),
            };
            if let Some(ended) = self.take_record(number, end, &record) {
                return Poll::Ready(ended);
            }
        }
        let now = Instant::now();
        while end.socket.has_room() {
            let mut over = None;
            let compose = |out: &mut Vec<u8>| {
                // Records of a rekey go first, and no others under a key that is too old. The machine
                // works without the lock, as it may have to make a handshake.
                let greeted = self.lock().channel.is_greeted();
                match end.rekey.poll_transmit(now, greeted, out) {
                    Ok(true) => true,
                    Ok(false) => {
                        let mut inner = self.lock();
                        let composed = inner.channel.poll_transmit(now, out);
                        self.tell(&mut inner);
                        composed
                    }
                    Err(ended) => {
                        over = Some(ended);
                        false
                    }
                }
            };
            match end.socket.queue(&mut end.sealer, compose) {
                Ok(Some(length)) => {
                    if let Some(next) = end.rekey.sealed(length) {
                        end.sealer = next;
                    }
                }
                Ok(None) => match over {
                    Some(ended) => return Poll::Ready(End::Rekey(ended)),
                    None => break,
                },
                Err(error) => return Poll::Ready(End::Socket(error.to_string())),
            }
        }
        let full = !end.socket.has_room();
        let flushed = match end.socket.poll_flush(cx) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => return Poll::Ready(End::Socket(error.to_string())),
            Poll::Pending => false,
        };
        let mut inner = self.lock();
        if flushed && !full {
            match (inner.ended, inner.over) {
                (Some(reason), _) => return Poll::Ready(End::Channel(reason)),
                (None, Some(Some(code))) => return Poll::Ready(End::Peer(code)),
                (None, Some(None)) => return Poll::Ready(End::Silent),
                (None, None) => {}
            }
        }
        if read || flushed && full {
            // There may be more, after those who wait for what has been.
            cx.waker().wake_by_ref();
            inner.driver = None;
        } else if !inner.driver.as_ref().is_some_and(|driver| driver.will_wake(cx.waker())) {
            inner.driver = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// The channel is on the tunnel with this number; takes it off when dropped, as a task that is given up
/// must not leave it there.
struct Attached<'c> {
    channel: &'c ChannelHandle,
    number: u64,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let shared = &self.channel.0;
        let mut inner = self.channel.lock();
        if *shared.tunnel.borrow() != self.number {
            return;
        }
        let status = if inner.ended.is_some() { Status::Closed } else { Status::Detached };
        inner.channel.detach();
        inner.driver = None;
        shared.status.send_replace(status);
    }
}

/// A timer that is set anew far more often than it expires: it is touched only to be made earlier.
struct Timer {
    sleep: Pin<Box<Sleep>>,
    set_for: Option<Instant>,
}

impl Timer {
    fn new() -> Self {
        Self { sleep: Box::pin(sleep_until(tokio::time::Instant::now())), set_for: None }
    }

    /// Whether the time it was set for has come.
    fn poll_expired(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> bool {
        let expired = self.set_for.is_some() && self.sleep.as_mut().poll(cx).is_ready();
        if expired {
            self.set_for = None;
        }
        expired
    }

    /// Wakes the task at `deadline`, or before.
    fn set(mut self: Pin<&mut Self>, cx: &mut Context<'_>, deadline: Instant) {
        if self.set_for.is_none_or(|set_for| deadline < set_for) {
            self.set_for = Some(deadline);
            self.sleep.as_mut().reset(deadline.into());
            if self.sleep.as_mut().poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
    }
}

/// One stream of a channel: what a TCP connection is on either side of it.
///
/// Dropping it before both directions ended resets it, which the other side's client sees as a
/// connection reset, never as a clean end.
#[derive(Debug)]
pub struct Stream {
    channel: ChannelHandle,
    id: StreamId,
}

impl Stream {
    /// Waits until bytes can be written; returns how many.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn writable(&self) -> io::Result<usize> {
        poll_fn(|context| self.poll_writable(context)).await
    }

    fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut inner = self.channel.lock();
        match inner.channel.room(self.id) {
            Ok(0) => {
                inner.wakers.entry(self.id).or_default().write = Some(context.waker().clone());
                Poll::Pending
            }
            Ok(room) => Poll::Ready(Ok(room)),
            Err(error) => Poll::Ready(Err(to_io(error))),
        }
    }

    /// Writes all of `bytes`, as room for them comes. What [`Stream::writable`] found may be gone:
    /// the streams of a channel share it, and others write meanwhile.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn write_all(&self, mut bytes: Bytes) -> io::Result<()> {
        loop {
            self.channel.with(|channel| channel.write(self.id, &mut bytes)).map_err(to_io)?;
            if bytes.is_empty() {
                return Ok(());
            }
            self.writable().await?;
        }
    }

    /// Ends this direction cleanly.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.channel.with(|channel| channel.finish(self.id)).map_err(to_io)
    }

    /// Waits for bytes and takes up to `most` of them; an empty result is the end.
    ///
    /// # Errors
    /// When the stream was reset.
    pub(crate) async fn read(&self, most: usize) -> io::Result<Bytes> {
        poll_fn(|context| self.poll_take(context, most)).await
    }

    fn poll_take(&self, context: &mut Context<'_>, most: usize) -> Poll<io::Result<Bytes>> {
        let mut inner = self.channel.lock();
        let read = match inner.channel.read(self.id, most) {
            Ok(Read::Blocked) => {
                inner.wakers.entry(self.id).or_default().read = Some(context.waker().clone());
                return Poll::Pending;
            }
            Ok(Read::Bytes(bytes)) => Ok(bytes),
            Ok(Read::Finished) => Ok(Bytes::new()),
            Err(error) => Err(to_io(error)),
        };
        self.channel.after(inner);
        Poll::Ready(read)
    }

    /// Tells the reacher that the target answered.
    pub(crate) fn opened(&self) {
        self.channel.with(|channel| channel.opened(self.id));
    }

    /// Ends both directions at once.
    pub(crate) fn reset(&self, code: ResetCode) {
        self.channel.with(|channel| channel.reset(self.id, code));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut inner = self.channel.lock();
        inner.wakers.remove(&self.id);
        inner.channel.release(self.id);
        self.channel.after(inner);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let bytes = ready!(self.poll_take(context, buffer.remaining()))?;
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_writable(context))?;
        Poll::Ready(self.channel.with(|channel| channel.write(self.id, bytes)).map_err(to_io))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

fn to_io(error: StreamError) -> io::Error {
    let kind = match error {
        StreamError::Reset(ResetCode::TargetRefused) => io::ErrorKind::ConnectionRefused,
        StreamError::Reset(ResetCode::TargetUnreachable) => io::ErrorKind::HostUnreachable,
        StreamError::Reset(ResetCode::TargetTimeout) => io::ErrorKind::TimedOut,
        StreamError::Reset(
            ResetCode::Aborted
            | ResetCode::Busy
            | ResetCode::Lost
            | ResetCode::UnknownPurpose
            | ResetCode::Other(_),
        )
        | StreamError::Closed => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, error)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn bytes_whose_room_went_to_other_streams_wait_and_are_not_lost() {
        let channel = ChannelHandle::reacher();
        let stream = channel.open_stream(Purpose::Target).unwrap();
        let bytes = Bytes::from(vec![7; stream.writable().await.unwrap()]);
        // No tunnel is up, so what the others write stays, and the room of the channel ends.
        let mut others = Vec::new();
        loop {
            let other = channel.open_stream(Purpose::Target).unwrap();
            let Some(room) = other.writable().now_or_never() else { break };
            other.write_all(vec![9; room.unwrap()].into()).await.unwrap();
            others.push(other);
        }
        let mut writing = pin!(stream.write_all(bytes));
        assert!(writing.as_mut().now_or_never().is_none(), "there is no room");
        channel.close(CloseCode::Normal);
        assert!(writing.await.is_err(), "and none comes any more");
    }
}
