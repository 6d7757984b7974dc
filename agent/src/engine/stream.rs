//! The two halves of one stream: what is kept until acknowledged, and what waits to be read.

use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use connect_spec::limits::{INITIAL_STREAM_WINDOW, MAX_STREAM_WINDOW};

use super::{channel::ProtocolViolation, chunks::Chunks};

/// Bytes that a writer may put ahead of what is sent: enough that the tunnel always finds work, and
/// little enough that it is still in the processor's cache when it is sealed.
const WRITE_AHEAD: u64 = 128 * 1024;
/// A writer that found no room is told of at least so much: small pieces cost more than they bring.
const WORTH_WAKING: usize = 64 * 1024;
/// Received bytes that may wait for an ACK before one is sent at once.
const ACK_EVERY: u64 = 128 * 1024;

/// Windows over which the pace of a reader is taken.
const PACED_WINDOWS: u32 = 4;

/// The sending half: bytes stay until the peer has them, so that a new tunnel can send them again.
#[derive(Debug)]
pub(super) struct SendHalf {
    kept: Chunks,
    /// Offset of the first kept byte: everything below is acknowledged.
    acked: u64,
    /// Bytes below this offset are sent over the tunnel that is up.
    sent: u64,
    /// Bytes below this offset were sent over some tunnel, and are charged to the channel's credit.
    charged: u64,
    /// Credit: bytes below this offset may be sent.
    max_data: u64,
    /// The application writes no more.
    finished: bool,
    fin_sent: bool,
    /// FIN was sent over some tunnel.
    fin_tried: bool,
    fin_acked: bool,
}

impl SendHalf {
    pub(super) fn new() -> Self {
        Self {
            kept: Chunks::default(),
            acked: 0,
            sent: 0,
            charged: 0,
            max_data: INITIAL_STREAM_WINDOW,
            finished: false,
            fin_sent: false,
            fin_tried: false,
            fin_acked: false,
        }
    }

    fn written(&self) -> u64 {
        self.acked + self.kept.len() as u64
    }

    /// How many bytes a write may take. However much credit a peer grants, no more is kept for it than
    /// an honest one would ever need.
    pub(super) fn room(&self) -> usize {
        let sent = self.sent.min(self.acked.saturating_add(MAX_STREAM_WINDOW));
        let room = sent.saturating_add(WRITE_AHEAD).saturating_sub(self.written());
        usize::try_from(room).unwrap_or(usize::MAX)
    }

    /// Whether a writer that waits for room should be told.
    pub(super) fn worth_waking(&self) -> bool {
        self.room() >= WORTH_WAKING
    }

    /// Takes the next `length` of `bytes`, for which [`SendHalf::room`] was asked.
    pub(super) fn write(&mut self, bytes: impl Buf, length: usize) {
        self.kept.push(bytes, length);
    }

    /// Bytes that are kept until the peer has them.
    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }

    pub(super) fn finish(&mut self) {
        self.finished = true;
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// The next byte to send over the tunnel that is up.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes sent over any tunnel: the final size in a RESET.
    pub(super) fn charged(&self) -> u64 {
        self.charged
    }

    /// How this direction ended, as far as the peer may know.
    pub(super) fn final_size(&self) -> Option<u64> {
        self.fin_tried.then_some(self.charged)
    }

    /// Bytes that the peer would still take.
    #[cfg(test)]
    pub(super) fn credit(&self) -> u64 {
        self.max_data - self.sent
    }

    /// Bytes sent that the peer may still lose.
    #[cfg(test)]
    pub(super) fn unacknowledged(&self) -> u64 {
        self.charged - self.acked
    }

    /// Bytes that may be sent now, given what the channel's credit leaves for new ones.
    pub(super) fn sendable(&self, channel_credit: u64) -> usize {
        let end = self.written().min(self.max_data).max(self.sent);
        let free = (self.charged - self.sent).saturating_add(channel_credit);
        usize::try_from((end - self.sent).min(free)).unwrap_or(usize::MAX)
    }

    /// Appends the next `length` bytes to `record` and counts them as sent; returns how many of them
    /// are new to the channel's credit.
    pub(super) fn take(&mut self, length: usize, record: &mut Vec<u8>) -> u64 {
        let start = usize::try_from(self.sent - self.acked).expect("kept bytes fit memory");
        self.kept.copy_to(start, length, record);
        self.sent += length as u64;
        let new = self.sent.saturating_sub(self.charged);
        self.charged += new;
        new
    }

    /// The final size, when FIN is due; it counts as sent from here on.
    pub(super) fn take_fin(&mut self) -> Option<u64> {
        let due = self.fin_due();
        self.fin_sent |= due;
        self.fin_tried |= due;
        due.then_some(self.sent)
    }

    pub(super) fn fin_due(&self) -> bool {
        self.finished && !self.fin_sent && self.sent == self.written()
    }

    /// The peer holds all bytes below `offset`. FIN counts as one more, as in TCP.
    pub(super) fn handle_ack(&mut self, offset: u64) -> Result<(), ProtocolViolation> {
        let end = self.charged + u64::from(self.fin_tried);
        if offset > end {
            return Err(ProtocolViolation("acknowledged more than was sent"));
        }
        self.fin_acked |= self.fin_tried && offset == end;
        let acked = offset.min(self.charged);
        if let Some(freed) = acked.checked_sub(self.acked) {
            // A reset stream keeps nothing, and what it sent before may still be acknowledged.
            let freed = usize::try_from(freed).unwrap_or(usize::MAX).min(self.kept.len());
            self.kept.advance(freed);
            self.acked = acked;
        }
        Ok(())
    }

    /// Goes back to what the peer has, on a new tunnel: `received` is what its ACK would say.
    pub(super) fn resume(&mut self, received: u64) -> Result<(), ProtocolViolation> {
        if received < self.acked {
            return Err(ProtocolViolation("bytes are missing that were acknowledged"));
        }
        self.handle_ack(received)?;
        self.sent = self.acked;
        self.fin_sent = self.fin_acked;
        Ok(())
    }

    /// The peer finished with the stream, so it has the FIN too.
    pub(super) fn settle(&mut self) {
        self.fin_acked = true;
    }

    /// Drops what is kept; returns how many bytes.
    pub(super) fn discard(&mut self) -> usize {
        std::mem::take(&mut self.kept).len()
    }

    /// A lower grant than before is an old one and changes nothing.
    pub(super) fn handle_window(&mut self, max_data: u64) {
        self.max_data = self.max_data.max(max_data);
    }

    /// Nothing is left to send or to wait for.
    pub(super) fn is_done(&self) -> bool {
        self.fin_acked
    }
}

/// The receiving half: bytes in order, waiting for the application.
#[derive(Debug)]
pub(super) struct RecvHalf {
    waiting: Chunks,
    /// Bytes below this offset are received.
    received: u64,
    /// Bytes below this offset are read by the application, or dropped.
    consumed: u64,
    /// Credit granted to the peer.
    max_data: u64,
    window: u64,
    /// When, and at which offset, the reader's pace was last looked at.
    paced: Option<(Instant, u64)>,
    total: Option<u64>,
    /// What the last ACK said.
    acked: u64,
    /// A read found nothing: tell when there is something.
    pub(super) blocked: bool,
    /// The application reads no more: what arrives is dropped.
    discard: bool,
}

impl RecvHalf {
    pub(super) fn new() -> Self {
        Self {
            waiting: Chunks::default(),
            received: 0,
            consumed: 0,
            max_data: INITIAL_STREAM_WINDOW,
            window: INITIAL_STREAM_WINDOW,
            paced: None,
            total: None,
            acked: 0,
            blocked: false,
            discard: false,
        }
    }

    /// Takes bytes at `offset`; returns how many are new to the channel's credit.
    pub(super) fn handle_data(
        &mut self,
        offset: u64,
        mut bytes: Bytes,
    ) -> Result<u64, ProtocolViolation> {
        let end = offset + bytes.len() as u64;
        if offset > self.received {
            return Err(ProtocolViolation("gap in a stream"));
        }
        if end > self.max_data {
            return Err(ProtocolViolation("bytes beyond the stream's credit"));
        }
        if self.total.is_some_and(|total| end > total) {
            return Err(ProtocolViolation("bytes beyond the stream's end"));
        }
        let fresh = end.saturating_sub(self.received);
        let repeated = bytes.len() - usize::try_from(fresh).expect("no more than the record holds");
        self.received += fresh;
        if self.discard {
            self.consumed = self.received;
        } else {
            bytes.advance(repeated);
            let length = bytes.len();
            self.waiting.push(bytes, length);
        }
        Ok(fresh)
    }

    /// Takes the final size; returns how many bytes that never came it adds to the channel's credit.
    pub(super) fn handle_end(&mut self, total: u64) -> Result<u64, ProtocolViolation> {
        if self.total.is_some_and(|known| known != total) {
            return Err(ProtocolViolation("two final sizes of one stream"));
        }
        if total > self.max_data {
            return Err(ProtocolViolation("final size beyond the stream's credit"));
        }
        let missing = total
            .checked_sub(self.received)
            .ok_or(ProtocolViolation("final size below what was received"))?;
        self.total = Some(total);
        Ok(missing)
    }

    /// Takes the final size of a RESET: what did not come by then never will. Returns how many bytes
    /// that is.
    pub(super) fn handle_reset(&mut self, total: u64) -> Result<u64, ProtocolViolation> {
        let missing = self.handle_end(total)?;
        self.received = total;
        self.discard();
        Ok(missing)
    }

    /// Bytes received so far.
    #[cfg(test)]
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Takes waiting bytes, at most `most`; none when nothing waits.
    pub(super) fn read(&mut self, most: usize) -> Bytes {
        let bytes = self.waiting.pop(most);
        self.consumed += bytes.len() as u64;
        bytes
    }

    /// Drops what waits and what will come; returns how many bytes were waiting.
    pub(super) fn discard(&mut self) -> u64 {
        self.discard = true;
        self.consumed = self.received;
        std::mem::take(&mut self.waiting).len() as u64
    }

    /// Bytes that a read would find.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The peer finished, and every byte of it is here.
    pub(super) fn is_complete(&self) -> bool {
        self.total == Some(self.received)
    }

    /// The peer finished, and the application read it all.
    pub(super) fn is_done(&self) -> bool {
        self.total == Some(self.consumed)
    }

    /// What an ACK would say: FIN counts as one more byte, as in TCP.
    fn ack_offset(&self) -> u64 {
        self.received + u64::from(self.is_complete())
    }

    /// Whether anything is unacknowledged.
    pub(super) fn ack_due(&self) -> bool {
        self.ack_offset() > self.acked
    }

    /// Whether an ACK should go out without waiting for more.
    pub(super) fn ack_urgent(&self) -> bool {
        self.ack_due() && (self.is_complete() || self.received - self.acked >= ACK_EVERY)
    }

    /// The offset of an ACK that counts as sent from here on.
    pub(super) fn take_ack(&mut self) -> u64 {
        self.acked = self.ack_offset();
        self.acked
    }

    /// Whether a quarter of the window was read since the last grant.
    pub(super) fn window_due(&self) -> bool {
        self.total.is_none() && self.consumed + self.window - self.max_data >= self.window / 4
    }

    /// A new grant. The window doubles while it is read faster than once in one and a half of the tunnel's
    /// shortest round trips: then the window, not the reader, is what the sender waits for. A window that
    /// followed the round trips under load would feed itself, and so would one that grew by a single
    /// window that had piled up.
    pub(super) fn take_window(&mut self, now: Instant, round_trip: Option<Duration>) -> u64 {
        let (since, from) = *self.paced.get_or_insert((now, self.consumed));
        if self.consumed - from >= u64::from(PACED_WINDOWS) * self.window {
            let pace = now.duration_since(since) / PACED_WINDOWS;
            if round_trip.is_some_and(|round_trip| 2 * pace < 3 * round_trip) {
                self.window = (2 * self.window).min(MAX_STREAM_WINDOW);
            }
            self.paced = Some((now, self.consumed));
        }
        // After the end, nothing more is granted: the final size was within the last grant.
        if self.total.is_none() {
            self.max_data = self.consumed + self.window;
        }
        self.max_data
    }
}
