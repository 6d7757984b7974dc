//! Records: what one Noise message of a tunnel holds. PROTOCOL.md, "Records".
//!
//! `type u8 || fields`, integers big-endian. The streams inside a channel follow QUIC (RFC 9000
//! sections 2 to 4): absolute offsets, credit per stream and per channel, final sizes.

use crate::{
    keys::ML_KEM_768_CT_BYTES,
    limits::{
        DATA_PADDING, MAX_DATA_BYTES, MAX_HANDSHAKE_BYTES, MAX_LOCATOR, MAX_RECORD_BYTES,
        MAX_REKEY_ATTEMPTS, MAX_TRUST_BYTES,
    },
    log::{EntryHash, Head},
};

/// A stream of a channel. Even, from 2, by the reacher; odd ones are reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u32);

impl StreamId {
    /// The first stream of a channel.
    pub const FIRST: Self = Self(2);

    /// The stream with this number, if it is one that a reacher may open.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        (number >= 2 && number.is_multiple_of(2)).then_some(Self(number))
    }

    /// The number.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }

    /// The next stream that the reacher opens; `None` when a channel has used them all.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(2).map(Self)
    }
}

/// Declares codes whose unknown values are kept.
macro_rules! wire_codes {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $number:literal = $variant:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $type {
            $($(#[$variant_doc])* $variant,)*
            /// A code of a newer version.
            Other(u16),
        }

        impl $type {
            /// The number on the wire.
            #[must_use]
            pub fn number(self) -> u16 {
                match self { $(Self::$variant => $number,)* Self::Other(number) => number }
            }

            /// The code with this number.
            #[must_use]
            pub fn from_number(number: u16) -> Self {
                match number { $($number => Self::$variant,)* other => Self::Other(other) }
            }
        }
    };
}

wire_codes!(
    /// Why a stream was reset.
    ResetCode {
        /// The sender's application went away without a clean end.
        0 = Aborted,
        /// The target refused the connection.
        1 = TargetRefused,
        /// The target could not be reached, or its name not resolved.
        2 = TargetUnreachable,
        /// The target did not answer in time.
        3 = TargetTimeout,
        /// The exposer has too many streams or files open.
        4 = Busy,
        /// The other side lost the stream in a restart.
        5 = Lost,
        /// The exposer does not know the purpose for which the stream was opened.
        6 = UnknownPurpose,
    }
);

wire_codes!(
    /// Why a tunnel or a channel was closed.
    CloseCode {
        /// Done, or the agent is stopping.
        0 = Normal,
        /// A record broke the protocol.
        1 = Protocol,
        /// The service is not exposed here any more.
        2 = ServiceGone,
        /// The peer is not, or no longer, trusted or allowed.
        3 = Forbidden,
        /// A newer tunnel of the channel took over.
        4 = Stale,
        /// The channel is not known here: restarted or expired.
        5 = Lost,
        /// The peer's trust log is one that this program cannot read.
        6 = UpgradeNeeded,
        /// A limit is reached.
        7 = Busy,
    }
);

/// What a stream is for. PROTOCOL.md, "Checks".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A connection to the target.
    Target,
    /// The exposer looks at its target and answers with a [`crate::check::CheckReport`].
    Check,
    /// The exposer drops what it reads, and answers with how many bytes that were.
    Sink,
    /// The exposer sends as many bytes as it is asked for.
    Source,
    /// A purpose of a newer version, at least 4.
    Other(u8),
}

impl Purpose {
    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Target => 0,
            Self::Check => 1,
            Self::Sink => 2,
            Self::Source => 3,
            Self::Other(number) => number,
        }
    }

    /// The purpose with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Target,
            1 => Self::Check,
            2 => Self::Sink,
            3 => Self::Source,
            other => Self::Other(other),
        }
    }
}

/// How far one stream got, as HELLO and WELCOME list it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// The stream.
    pub stream: StreamId,
    /// Bytes received in order.
    pub received: u64,
    /// Credit granted: the peer may send bytes below this offset.
    pub max_data: u64,
    /// The sender's final size, once sent by FIN or RESET.
    pub end: Option<End>,
}

/// How the listing side ended its own direction of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// FIN after this many bytes.
    Fin(u64),
    /// RESET after this many bytes.
    Reset(u64),
}

/// How far a channel got: the body of HELLO and WELCOME.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The lowest stream never opened.
    pub next_stream: StreamId,
    /// Credit of the channel: the peer may send this many stream bytes in all.
    pub max_data: u64,
    /// Stream bytes that the peer has sent in all, as far as they arrived or a RESET told of them:
    /// what it was charged for beyond these, and does not send again, it gets back.
    pub received: u64,
    /// Open streams by ascending id.
    pub streams: Vec<StreamState>,
    /// Whether another record of the same type continues the list.
    pub more: bool,
}

/// Names one handshake of a rekey.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RekeyTry {
    /// Which keys of the tunnel these will be: the first are 0, so at least 1.
    pub number: u32,
    /// How many handshakes were begun for the same number before: below [`MAX_REKEY_ATTEMPTS`].
    pub attempt: u8,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'b> {
    /// First record of the reacher: confirms the keys and says how far it got.
    Hello {
        /// Whether this is the channel's first tunnel.
        new: bool,
        /// How far the reacher got.
        progress: Progress,
    },
    /// Answer of the exposer.
    Welcome(Progress),
    /// The sender has reached the trust head that the other claimed, and judged it by it.
    Ready,
    /// Asks for the entries of the trust log after the newest place that both sides have.
    TrustGet(Vec<Head>),
    /// Entries that were asked for.
    Trust {
        /// Whether another record continues the list.
        more: bool,
        /// `LogEntry`s as they travel, each after its length as u32: see [`trust_entries`].
        entries: &'b [u8],
    },
    /// Opens a stream; for [`Purpose::Target`] the exposer dials its target.
    Open {
        /// The stream.
        stream: StreamId,
        /// What it is for.
        purpose: Purpose,
    },
    /// The target answered the dial.
    Opened(StreamId),
    /// Bytes of a stream.
    Data {
        /// The stream.
        stream: StreamId,
        /// Offset of the first byte.
        offset: u64,
        /// At least one byte.
        bytes: &'b [u8],
    },
    /// The sender holds all bytes below the offset: they need not be kept.
    Ack {
        /// The stream.
        stream: StreamId,
        /// Bytes received in order.
        offset: u64,
    },
    /// Grants credit: to a stream, or to the channel.
    Window {
        /// The stream, or the channel.
        stream: Option<StreamId>,
        /// Bytes that may be sent in all.
        max_data: u64,
    },
    /// No bytes follow in this direction.
    Fin {
        /// The stream.
        stream: StreamId,
        /// Bytes sent in all.
        total: u64,
    },
    /// Both directions end at once; unread bytes are dropped.
    Reset {
        /// The stream.
        stream: StreamId,
        /// Why.
        code: ResetCode,
        /// Bytes that the sender had sent; counts in the channel's credit.
        total: u64,
    },
    /// Asks for a PONG: proves that the path works and measures it.
    Ping(u64),
    /// Answers a PING with its number.
    Pong(u64),
    /// Asks the reacher to begin the rekey of this number.
    HsWant(u32),
    /// Message 1 of the handshake of a rekey.
    Hs1 {
        /// Which rekey, and which try.
        rekey: RekeyTry,
        /// As an `open_tunnel` carries it.
        message: &'b [u8],
    },
    /// Message 2, which answers the message 1 of the same rekey and try.
    Hs2 {
        /// Which rekey, and which try.
        rekey: RekeyTry,
        /// As an `accept_tunnel` carries it.
        message: &'b [u8],
    },
    /// The sender's last record under its old key: all that follow are under the key of this handshake.
    Switch(RekeyTry),
    /// The tunnel ends; the channel may go on in another.
    TunnelClose(CloseCode),
    /// The channel ends, and every stream in it.
    ChannelClose(CloseCode),
}

/// A record that breaks the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Empty, truncated, or longer than its fields.
    #[error("record of type {0:#04x} has the wrong length")]
    Length(u8),
    /// A type that this version does not know.
    #[error("record type {0:#04x} is unknown")]
    Type(u8),
    /// A value that its field does not allow.
    #[error("record of type {0:#04x} holds a value that is not allowed")]
    Value(u8),
}

mod number {
    pub(super) const HELLO: u8 = 0x01;
    pub(super) const WELCOME: u8 = 0x02;
    pub(super) const READY: u8 = 0x03;
    pub(super) const TRUST_GET: u8 = 0x04;
    pub(super) const TRUST: u8 = 0x05;
    pub(super) const OPEN: u8 = 0x10;
    pub(super) const OPENED: u8 = 0x11;
    pub(super) const DATA: u8 = 0x12;
    pub(super) const ACK: u8 = 0x13;
    pub(super) const WINDOW: u8 = 0x14;
    pub(super) const FIN: u8 = 0x15;
    pub(super) const RESET: u8 = 0x16;
    pub(super) const PING: u8 = 0x20;
    pub(super) const PONG: u8 = 0x21;
    pub(super) const HS_WANT: u8 = 0x30;
    pub(super) const HS1: u8 = 0x31;
    pub(super) const HS2: u8 = 0x32;
    pub(super) const SWITCH: u8 = 0x33;
    pub(super) const TUNNEL_CLOSE: u8 = 0x3e;
    pub(super) const CHANNEL_CLOSE: u8 = 0x3f;
}

/// Streams that fit one HELLO or WELCOME; longer lists go on in another.
pub const STREAMS_PER_PROGRESS: usize = 1024;
/// `type u8 || pad u8 || stream u32 || offset u64` before the bytes of a DATA record.
pub const DATA_HEADER_BYTES: usize = 14;

const FLAG_NEW: u8 = 1;
const FLAG_MORE: u8 = 2;
const END_NONE: u8 = 0;
const END_FIN: u8 = 1;
const END_RESET: u8 = 2;

/// Begins a DATA record of `length` bytes at the end of `record`.
///
/// The caller appends exactly `length` bytes and then calls [`end_data`]; so bytes go from where
/// they are kept into the record in one copy.
///
/// # Panics
/// When `length` is 0 or over [`MAX_DATA_BYTES`]: the caller cuts what it sends.
pub fn begin_data(record: &mut Vec<u8>, stream: StreamId, offset: u64, length: usize) {
    assert!((1..=MAX_DATA_BYTES).contains(&length), "DATA carries 1 to {MAX_DATA_BYTES} bytes");
    record.push(number::DATA);
    record.push(padding(length));
    record.extend_from_slice(&stream.0.to_be_bytes());
    record.extend_from_slice(&offset.to_be_bytes());
}

/// Pads the DATA record of `length` bytes that [`begin_data`] began.
pub fn end_data(record: &mut Vec<u8>, length: usize) {
    record.resize(record.len() + usize::from(padding(length)), 0);
}

fn padding(length: usize) -> u8 {
    let total = DATA_HEADER_BYTES + length;
    u8::try_from(total.next_multiple_of(DATA_PADDING) - total).expect("padding is below 16")
}

/// Whether a record is one of those that replace the keys of the tunnel, by its type alone.
#[must_use]
pub fn is_rekey(record: &[u8]) -> bool {
    matches!(record.first(), Some(number::HS_WANT..=number::SWITCH))
}

impl RekeyTry {
    fn encode(self, record: &mut Vec<u8>, kind: u8) {
        record.push(kind);
        record.extend_from_slice(&self.number.to_be_bytes());
        record.push(self.attempt);
    }

    fn decode(fields: &mut Reader<'_>) -> Result<Self, RecordError> {
        let rekey = Self { number: fields.rekey_number()?, attempt: fields.u8()? };
        if rekey.attempt < MAX_REKEY_ATTEMPTS { Ok(rekey) } else { Err(fields.bad_value()) }
    }
}

impl Progress {
    fn encode(&self, record: &mut Vec<u8>, kind: u8, flags: u8) {
        record.push(kind);
        record.push(flags | if self.more { FLAG_MORE } else { 0 });
        record.extend_from_slice(&self.next_stream.0.to_be_bytes());
        record.extend_from_slice(&self.max_data.to_be_bytes());
        record.extend_from_slice(&self.received.to_be_bytes());
        let count = u16::try_from(self.streams.len()).expect("callers split longer lists");
        record.extend_from_slice(&count.to_be_bytes());
        for state in &self.streams {
            record.extend_from_slice(&state.stream.0.to_be_bytes());
            record.extend_from_slice(&state.received.to_be_bytes());
            record.extend_from_slice(&state.max_data.to_be_bytes());
            let (end, total) = match state.end {
                None => (END_NONE, 0),
                Some(End::Fin(total)) => (END_FIN, total),
                Some(End::Reset(total)) => (END_RESET, total),
            };
            record.push(end);
            record.extend_from_slice(&total.to_be_bytes());
        }
    }

    fn decode(fields: &mut Reader<'_>) -> Result<(bool, Self), RecordError> {
        let flags = fields.u8()?;
        if flags & !(FLAG_NEW | FLAG_MORE) != 0 {
            return Err(fields.bad_value());
        }
        let next_stream = fields.stream()?;
        let (max_data, received) = (fields.u64()?, fields.u64()?);
        let count = usize::from(fields.u16()?);
        if count > STREAMS_PER_PROGRESS {
            return Err(fields.bad_value());
        }
        let mut streams: Vec<StreamState> = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = fields.stream()?;
            if stream >= next_stream || streams.last().is_some_and(|last| last.stream >= stream) {
                return Err(fields.bad_value());
            }
            let (received, max_data) = (fields.u64()?, fields.u64()?);
            let end = match (fields.u8()?, fields.u64()?) {
                (END_NONE, 0) => None,
                (END_FIN, total) => Some(End::Fin(total)),
                (END_RESET, total) => Some(End::Reset(total)),
                _ => return Err(fields.bad_value()),
            };
            streams.push(StreamState { stream, received, max_data, end });
        }
        let more = flags & FLAG_MORE != 0;
        Ok((flags & FLAG_NEW != 0, Self { next_stream, max_data, received, streams, more }))
    }
}

impl<'b> Record<'b> {
    /// Appends the encoding to `record`.
    ///
    /// # Panics
    /// When DATA holds no byte or too many, or a list has over [`STREAMS_PER_PROGRESS`] streams.
    /// Handshake messages are not looked at: what is too long or empty is not read by the other side.
    pub fn encode(&self, record: &mut Vec<u8>) {
        match self {
            Self::Hello { new, progress } => {
                progress.encode(record, number::HELLO, if *new { FLAG_NEW } else { 0 });
            }
            Self::Welcome(progress) => progress.encode(record, number::WELCOME, 0),
            Self::Ready => record.push(number::READY),
            Self::TrustGet(have) => {
                record.push(number::TRUST_GET);
                record.push(u8::try_from(have.len()).expect("a locator is short"));
                for head in have {
                    record.extend_from_slice(&head.seq.to_be_bytes());
                    record.extend_from_slice(&head.hash.0);
                }
            }
            Self::Trust { more, entries } => {
                record.push(number::TRUST);
                record.push(if *more { FLAG_MORE } else { 0 });
                record.extend_from_slice(entries);
            }
            Self::Open { stream, purpose } => {
                put(record, number::OPEN, *stream, &[purpose.number()]);
            }
            Self::Opened(stream) => put(record, number::OPENED, *stream, &[]),
            Self::Data { stream, offset, bytes } => {
                begin_data(record, *stream, *offset, bytes.len());
                record.extend_from_slice(bytes);
                end_data(record, bytes.len());
            }
            Self::Ack { stream, offset } => {
                put(record, number::ACK, *stream, &offset.to_be_bytes());
            }
            Self::Window { stream, max_data } => {
                record.push(number::WINDOW);
                record.extend_from_slice(&stream.map_or(0, StreamId::number).to_be_bytes());
                record.extend_from_slice(&max_data.to_be_bytes());
            }
            Self::Fin { stream, total } => {
                put(record, number::FIN, *stream, &total.to_be_bytes());
            }
            Self::Reset { stream, code, total } => {
                put(record, number::RESET, *stream, &code.number().to_be_bytes());
                record.extend_from_slice(&total.to_be_bytes());
            }
            Self::Ping(value) => {
                record.push(number::PING);
                record.extend_from_slice(&value.to_be_bytes());
            }
            Self::Pong(value) => {
                record.push(number::PONG);
                record.extend_from_slice(&value.to_be_bytes());
            }
            Self::HsWant(number) => {
                record.push(number::HS_WANT);
                record.extend_from_slice(&number.to_be_bytes());
            }
            Self::Hs1 { rekey, message } => {
                rekey.encode(record, number::HS1);
                record.extend_from_slice(message);
            }
            Self::Hs2 { rekey, message } => {
                rekey.encode(record, number::HS2);
                record.extend_from_slice(message);
            }
            Self::Switch(rekey) => rekey.encode(record, number::SWITCH),
            Self::TunnelClose(code) => {
                record.push(number::TUNNEL_CLOSE);
                record.extend_from_slice(&code.number().to_be_bytes());
            }
            Self::ChannelClose(code) => {
                record.push(number::CHANNEL_CLOSE);
                record.extend_from_slice(&code.number().to_be_bytes());
            }
        }
    }

    /// Decodes one record.
    ///
    /// # Errors
    /// [`RecordError`]: an unknown type, a wrong length, or a value outside its field's set.
    pub fn decode(record: &'b [u8]) -> Result<Self, RecordError> {
        let (&kind, rest) = record.split_first().ok_or(RecordError::Length(0))?;
        if record.len() > MAX_RECORD_BYTES {
            return Err(RecordError::Length(kind));
        }
        let mut fields = Reader { kind, rest };
        let decoded = match kind {
            number::HELLO => {
                let (new, progress) = Progress::decode(&mut fields)?;
                Self::Hello { new, progress }
            }
            number::WELCOME => match Progress::decode(&mut fields)? {
                (false, progress) => Self::Welcome(progress),
                (true, _) => return Err(fields.bad_value()),
            },
            number::READY => Self::Ready,
            number::TRUST_GET => {
                let count = usize::from(fields.u8()?);
                if count > MAX_LOCATOR {
                    return Err(fields.bad_value());
                }
                let mut have: Vec<Head> = Vec::with_capacity(count);
                for _ in 0..count {
                    let head = Head { seq: fields.u64()?, hash: EntryHash(fields.fixed()?) };
                    if head.seq == 0 || have.last().is_some_and(|newer| newer.seq <= head.seq) {
                        return Err(fields.bad_value());
                    }
                    have.push(head);
                }
                Self::TrustGet(have)
            }
            number::TRUST => {
                let more = match fields.u8()? {
                    0 => false,
                    FLAG_MORE => true,
                    _ => return Err(fields.bad_value()),
                };
                let entries = std::mem::take(&mut fields.rest);
                // Nothing, and more of it, would never end.
                let endless = more && entries.is_empty();
                if endless || entries.len() > MAX_TRUST_BYTES || trust_entries(entries).is_none() {
                    return Err(fields.bad_value());
                }
                Self::Trust { more, entries }
            }
            number::OPEN => {
                Self::Open { stream: fields.stream()?, purpose: Purpose::from_number(fields.u8()?) }
            }
            number::OPENED => Self::Opened(fields.stream()?),
            number::DATA => fields.data()?,
            number::ACK => Self::Ack { stream: fields.stream()?, offset: fields.u64()? },
            number::WINDOW => {
                let stream = match fields.u32()? {
                    0 => None,
                    number => Some(StreamId::new(number).ok_or(fields.bad_value())?),
                };
                Self::Window { stream, max_data: fields.u64()? }
            }
            number::FIN => Self::Fin { stream: fields.stream()?, total: fields.u64()? },
            number::RESET => Self::Reset {
                stream: fields.stream()?,
                code: ResetCode::from_number(fields.u16()?),
                total: fields.u64()?,
            },
            number::PING => Self::Ping(fields.u64()?),
            number::PONG => Self::Pong(fields.u64()?),
            number::HS_WANT => Self::HsWant(fields.rekey_number()?),
            number::HS1 => Self::Hs1 {
                rekey: RekeyTry::decode(&mut fields)?,
                message: fields.handshake(MAX_HANDSHAKE_BYTES)?,
            },
            number::HS2 => Self::Hs2 {
                rekey: RekeyTry::decode(&mut fields)?,
                message: fields.handshake(ML_KEM_768_CT_BYTES + MAX_HANDSHAKE_BYTES)?,
            },
            number::SWITCH => Self::Switch(RekeyTry::decode(&mut fields)?),
            number::TUNNEL_CLOSE => Self::TunnelClose(CloseCode::from_number(fields.u16()?)),
            number::CHANNEL_CLOSE => Self::ChannelClose(CloseCode::from_number(fields.u16()?)),
            unknown => return Err(RecordError::Type(unknown)),
        };
        if fields.rest.is_empty() { Ok(decoded) } else { Err(RecordError::Length(kind)) }
    }
}

fn put(record: &mut Vec<u8>, kind: u8, stream: StreamId, rest: &[u8]) {
    record.push(kind);
    record.extend_from_slice(&stream.0.to_be_bytes());
    record.extend_from_slice(rest);
}

/// Appends an entry to the body of a TRUST record; false when it does not fit any more.
pub fn put_trust_entry(entries: &mut Vec<u8>, entry: &[u8]) -> bool {
    let fits = entries.len() + 4 + entry.len() <= MAX_TRUST_BYTES;
    if let (true, Ok(length)) = (fits, u32::try_from(entry.len())) {
        entries.extend_from_slice(&length.to_be_bytes());
        entries.extend_from_slice(entry);
    }
    fits
}

/// Splits the body of a TRUST record; `None` when a length does not fit.
#[must_use]
pub fn trust_entries(mut entries: &[u8]) -> Option<Vec<&[u8]>> {
    let mut split = Vec::new();
    while !entries.is_empty() {
        let (length, rest) = entries.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let (entry, rest) = rest.split_at_checked(length)?;
        split.push(entry);
        entries = rest;
    }
    Some(split)
}

/// The only code that cuts a record.
struct Reader<'b> {
    kind: u8,
    rest: &'b [u8],
}

impl<'b> Reader<'b> {
    fn bad_value(&self) -> RecordError {
        RecordError::Value(self.kind)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(RecordError::Length(self.kind))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, RecordError> {
        self.fixed().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, RecordError> {
        self.fixed().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, RecordError> {
        self.fixed().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, RecordError> {
        self.fixed().map(u64::from_be_bytes)
    }

    fn stream(&mut self) -> Result<StreamId, RecordError> {
        StreamId::new(self.u32()?).ok_or(self.bad_value())
    }

    fn rekey_number(&mut self) -> Result<u32, RecordError> {
        match self.u32()? {
            0 => Err(self.bad_value()),
            number => Ok(number),
        }
    }

    /// A handshake message: all that is left.
    fn handshake(&mut self, most: usize) -> Result<&'b [u8], RecordError> {
        let message = std::mem::take(&mut self.rest);
        if (1..=most).contains(&message.len()) {
            Ok(message)
        } else {
            Err(RecordError::Length(self.kind))
        }
    }

    fn data(&mut self) -> Result<Record<'b>, RecordError> {
        let pad = usize::from(self.u8()?);
        let (stream, offset) = (self.stream()?, self.u64()?);
        let rest = std::mem::take(&mut self.rest);
        let length = rest.len().checked_sub(pad).ok_or(RecordError::Length(self.kind))?;
        let (bytes, zeros) = rest.split_at(length);
        if bytes.is_empty() || bytes.len() > MAX_DATA_BYTES {
            return Err(RecordError::Length(self.kind));
        }
        let fits = offset.checked_add(bytes.len() as u64).is_some();
        if !fits || zeros.iter().any(|byte| *byte != 0) {
            return Err(self.bad_value());
        }
        Ok(Record::Data { stream, offset, bytes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(number: u32) -> StreamId {
        StreamId::new(number).expect("even, from 2")
    }

    /// Every record with its exact bytes: changing one is changing the protocol.
    #[test]
    fn records_have_these_bytes() {
        let check = |record: Record<'_>, expected: &str| {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert_eq!(hex::encode(&bytes), expected.replace(' ', ""));
            assert_eq!(Record::decode(&bytes), Ok(record));
            for cut in 0..bytes.len() {
                assert_ne!(Record::decode(&bytes[..cut]).ok(), Record::decode(&bytes).ok());
            }
        };
        let progress = Progress {
            next_stream: stream(6),
            max_data: 0x0100_0000,
            received: 0x33,
            streams: vec![
                StreamState { stream: stream(2), received: 5, max_data: 9, end: Some(End::Fin(7)) },
                StreamState { stream: stream(4), received: 1, max_data: 2, end: None },
            ],
            more: true,
        };
        check(
            Record::Hello { new: true, progress: progress.clone() },
            "01 03 00000006 0000000001000000 0000000000000033 0002 \
             00000002 0000000000000005 0000000000000009 01 0000000000000007 \
             00000004 0000000000000001 0000000000000002 00 0000000000000000",
        );
        check(
            Record::Welcome(Progress { streams: vec![], more: false, ..progress }),
            "02 00 00000006 0000000001000000 0000000000000033 0000",
        );
        check(Record::Ready, "03");
        let place = |seq, byte| Head { seq, hash: EntryHash([byte; 32]) };
        check(Record::TrustGet(vec![]), "04 00");
        check(
            Record::TrustGet(vec![place(258, 0xaa), place(1, 0xbb)]),
            &format!(
                "04 02 0000000000000102 {} 0000000000000001 {}",
                "aa".repeat(32),
                "bb".repeat(32)
            ),
        );
        check(Record::Trust { more: false, entries: &[] }, "05 00");
        check(
            Record::Trust { more: true, entries: &[0, 0, 0, 2, 7, 8, 0, 0, 0, 1, 9] },
            "05 02 00000002 0708 00000001 09",
        );
        let open = |purpose| Record::Open { stream: stream(2), purpose };
        check(open(Purpose::Target), "10 00000002 00");
        check(open(Purpose::Check), "10 00000002 01");
        check(open(Purpose::Sink), "10 00000002 02");
        check(open(Purpose::Source), "10 00000002 03");
        check(open(Purpose::Other(4)), "10 00000002 04");
        check(Record::Opened(stream(2)), "11 00000002");
        check(
            Record::Data { stream: stream(2), offset: 258, bytes: b"abc" },
            "12 0f 00000002 0000000000000102 616263 000000000000000000000000000000",
        );
        check(Record::Ack { stream: stream(2), offset: 3 }, "13 00000002 0000000000000003");
        check(
            Record::Window { stream: Some(stream(4)), max_data: 1 },
            "14 00000004 0000000000000001",
        );
        check(Record::Window { stream: None, max_data: 1 }, "14 00000000 0000000000000001");
        check(Record::Fin { stream: stream(2), total: 3 }, "15 00000002 0000000000000003");
        check(
            Record::Reset { stream: stream(2), code: ResetCode::TargetRefused, total: 3 },
            "16 00000002 0001 0000000000000003",
        );
        check(Record::Ping(1), "20 0000000000000001");
        check(Record::Pong(1), "21 0000000000000001");
        let rekey = RekeyTry { number: 258, attempt: 5 };
        check(Record::HsWant(258), "30 00000102");
        check(Record::Hs1 { rekey, message: b"abc" }, "31 00000102 05 616263");
        check(Record::Hs2 { rekey, message: b"a" }, "32 00000102 05 61");
        check(Record::Switch(rekey), "33 00000102 05");
        check(Record::TunnelClose(CloseCode::Stale), "3e 0004");
        check(Record::ChannelClose(CloseCode::Other(999)), "3f 03e7");
    }

    #[test]
    fn malformed_records_are_refused() {
        let check = |bytes: &str, expected: RecordError| {
            let bytes = hex::decode(bytes.replace(' ', "")).expect("hex");
            assert_eq!(Record::decode(&bytes), Err(expected));
        };
        check("", RecordError::Length(0));
        check("00", RecordError::Type(0x00));
        check("06", RecordError::Type(0x06));
        // TRUST_GET: no count, place missing, place 0, not descending.
        let place = |seq: &str| format!("{seq} {}", "aa".repeat(32));
        let (zero, one, two) =
            (place("0000000000000000"), place("0000000000000001"), place("0000000000000002"));
        check("04", RecordError::Length(0x04));
        check("04 00 00", RecordError::Length(0x04));
        check("04 01", RecordError::Length(0x04));
        check(&format!("04 01 {zero}"), RecordError::Value(0x04));
        check(&format!("04 02 {one} {two}"), RecordError::Value(0x04));
        check(&format!("04 02 {one} {one}"), RecordError::Value(0x04));
        check(&format!("04 02 {two} {one} 00"), RecordError::Length(0x04));
        // TRUST: no flags, an unknown flag, more of nothing, length or entry cut.
        check("05", RecordError::Length(0x05));
        check("05 01", RecordError::Value(0x05));
        check("05 03 00000000", RecordError::Value(0x05));
        check("05 02", RecordError::Value(0x05));
        check("05 00 000000", RecordError::Value(0x05));
        check("05 00 00000002 07", RecordError::Value(0x05));
        // Rekeying: no number, number 0, a try too many, no message, something after SWITCH.
        check("30 000001", RecordError::Length(0x30));
        check("30 00000000", RecordError::Value(0x30));
        check("30 00000001 00", RecordError::Length(0x30));
        for kind in [0x31, 0x32, 0x33] {
            check(&format!("{kind:02x} 00000001"), RecordError::Length(kind));
            check(&format!("{kind:02x} 00000000 00 61"), RecordError::Value(kind));
            check(&format!("{kind:02x} 00000001 06 61"), RecordError::Value(kind));
        }
        check("31 00000001 00", RecordError::Length(0x31));
        check("32 00000001 00", RecordError::Length(0x32));
        check("33 00000001 00 00", RecordError::Length(0x33));
        check("34", RecordError::Type(0x34));
        check("ff", RecordError::Type(0xff));
        check("03 00", RecordError::Length(0x03));
        check("10 00000002", RecordError::Length(0x10));
        check("10 00000002 00 00", RecordError::Length(0x10));
        check("10 00000000 00", RecordError::Value(0x10));
        check("10 00000003 00", RecordError::Value(0x10));
        check("14 00000001 0000000000000001", RecordError::Value(0x14));
        // DATA: nothing in it, all padding, padding longer than the rest, padding not zero, past 2^64.
        check("12 00 00000002 0000000000000000", RecordError::Length(0x12));
        check("12 02 00000002 0000000000000000 0000", RecordError::Length(0x12));
        check("12 03 00000002 0000000000000000 0000", RecordError::Length(0x12));
        check("12 01 00000002 0000000000000000 6101", RecordError::Value(0x12));
        check("12 00 00000002 ffffffffffffffff 61", RecordError::Value(0x12));
        // HELLO: unknown flag, stream at next_stream, streams not ascending, unknown end, end without total.
        check("01 04 00000002 0000000000000000 0000000000000000 0000", RecordError::Value(0x01));
        let state = |id: &str, end: &str| format!("{id} 0000000000000000 0000000000000000 {end}");
        let none = "00 0000000000000000";
        let hello = |count: &str, states: &str| {
            format!("01 01 00000004 0000000000000000 0000000000000000 {count} {states}")
        };
        check(&hello("0001", &state("00000004", none)), RecordError::Value(0x01));
        check(
            &hello("0002", &[state("00000002", none), state("00000002", none)].concat()),
            RecordError::Value(0x01),
        );
        check(&hello("0001", &state("00000002", "03 0000000000000000")), RecordError::Value(0x01));
        check(&hello("0001", &state("00000002", "00 0000000000000001")), RecordError::Value(0x01));
        check("02 01 00000002 0000000000000000 0000000000000000 0000", RecordError::Value(0x02));
    }

    #[test]
    fn handshake_messages_are_bounded_at_the_limit() {
        for (kind, most) in [(number::HS1, 4096), (number::HS2, 1088 + 4096)] {
            let mut record = vec![kind, 0, 0, 0, 1, 0];
            record.resize(record.len() + most, 7);
            assert!(Record::decode(&record).is_ok());
            record.push(7);
            assert_eq!(Record::decode(&record), Err(RecordError::Length(kind)));
        }
    }

    #[test]
    fn data_is_bounded_at_the_limit() {
        let mut record = Vec::new();
        let most = vec![7; MAX_DATA_BYTES];
        Record::Data { stream: stream(2), offset: 0, bytes: &most }.encode(&mut record);
        assert!(Record::decode(&record).is_ok());
        assert_eq!(record.len() % DATA_PADDING, 0);

        let mut over = vec![number::DATA, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0];
        over.resize(DATA_HEADER_BYTES + MAX_DATA_BYTES + 1, 7);
        assert_eq!(Record::decode(&over), Err(RecordError::Length(number::DATA)));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::decode(&bytes);
        }

        #[test]
        fn data_round_trips(offset in 0u64..u64::MAX / 2, bytes in proptest::collection::vec(any::<u8>(), 1..5000)) {
            let mut record = Vec::new();
            let data = Record::Data { stream: stream(2), offset, bytes: &bytes };
            data.encode(&mut record);
            prop_assert_eq!(Record::decode(&record), Ok(data));
        }
    }
}
