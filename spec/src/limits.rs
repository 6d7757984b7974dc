//! Every limit of the wire, with its reason. PROTOCOL.md, "Limits".

use std::time::Duration;

/// Characters of a service name: one DNS label.
pub const MAX_NAME_BYTES: usize = 63;
/// Bytes of a label: fits a terminal column.
pub const MAX_LABEL_BYTES: usize = 64;
/// Bytes of one tag (`connect invite --tag`).
pub const MAX_TAG_BYTES: usize = 32;
/// Tags of one certificate: enough for roles and teams, small enough for a handshake payload.
pub const MAX_TAGS: usize = 16;
/// Services that a share can name: with all tags they still fit a handshake message, where certificate
/// and credential both list them.
pub const MAX_SHARED_SERVICES: usize = 16;

/// Depth of a signed body: the deepest object of version 1 has four levels; eight leave room.
pub const MAX_CBOR_DEPTH: usize = 8;
/// Body of a genesis.
pub const MAX_GENESIS_BYTES: usize = 16 * 1024;
/// Body of a certificate, credential or NoiseKey: both chains fit one handshake message.
pub const MAX_OBJECT_BYTES: usize = 2048;
/// Signatures on one object: a genesis has one for each founding signer.
pub const MAX_SIGNATURES: usize = 16;
/// Body of an entry of the trust log: as a wire object, in base64, it fits one control message, and
/// one record of a tunnel.
pub const MAX_ENTRY_BYTES: usize = 40 * 1024;
/// Changes in one entry: what belongs together, such as a revocation and the next epoch.
pub const MAX_CHANGES: usize = 16;
/// Hashes in one `keep`: with 1,000 of 34 bytes each, the entry has room for its other changes. An
/// invite has at most as many uses.
pub const MAX_KEPT: usize = 1000;
/// Branches that one entry can end.
pub const MAX_ABANDONED: usize = 16;
/// Signers at one time.
pub const MAX_SIGNERS: usize = 64;
/// Branches of a forked log whose revocations are kept. More of them are not taken in, so that nobody's
/// word counts any more once there are so many.
pub const MAX_BRANCHES: usize = 8;
/// Entries of a trust log: three a day for a lifetime.
pub const MAX_LOG_ENTRIES: u64 = 100_000;
/// All entries of a trust log together: what a new agent must fetch. Bodies count, not signatures: two
/// copies of an entry need not carry the same ones, and all readers must agree.
pub const MAX_LOG_BYTES: u64 = 64 * 1024 * 1024;
/// Places that a locator names: enough for [`MAX_LOG_ENTRIES`].
pub const MAX_LOCATOR: usize = 20;
/// Entries in one TRUST record.
pub const MAX_TRUST_BYTES: usize = 60_000;
/// A peer delivers the entries that it claimed within this time, or the tunnel is closed.
pub const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(10);
/// Witnesses publish a beat so often.
pub const BEAT_INTERVAL: Duration = Duration::from_secs(600);
/// Without a beat for this long, nobody knows whether the hub shows the whole log.
pub const BEAT_STALE: Duration = Duration::from_secs(3600);
/// Beats in one answer of the hub: a few witnesses are enough.
pub const MAX_BEATS: usize = 16;
/// Names of the epoch before are looked up for this long after a new one was learned of.
pub const OLD_EPOCH: Duration = Duration::from_secs(24 * 3600);
/// Plaintext of a sealed record: certificate, credential, NoiseKey and signature with room.
pub const MAX_RECORD_PLAINTEXT_BYTES: usize = 8 * 1024;

/// The longest invite: the length for which bech32m still detects errors (BIP-350).
pub const MAX_INVITE_CHARS: usize = 1023;
/// The longest hub URL in an invite.
pub const MAX_HUB_URL_BYTES: usize = 255;
/// Certificates of an invite are provisional for at most this long.
pub const MAX_CERTS: Duration = Duration::from_secs(90 * 24 * 3600);
/// Wall clocks may be wrong by this much before a member's certificate counts as expired.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(24 * 3600);
/// Rows of an audit log are kept for at least so long: the database holds the hub to it, so whoever takes the
/// hub over cannot wipe its traces, and no reader believes that younger rows went for their age.
pub const MIN_AUDIT_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);

/// A control message: the largest is a list of agents, which the hub splits in pages.
pub const MAX_CONTROL_BYTES: usize = 64 * 1024;
/// One Noise handshake message (the psk of suite 1 travels beside it).
pub const MAX_HANDSHAKE_BYTES: usize = 4096;
/// Payloads of the handshake are padded to a multiple of this, so that their length tells little.
pub const HANDSHAKE_PADDING: usize = 512;
/// One Noise message (Noise specification revision 34, section 3).
pub const MAX_NOISE_BYTES: usize = 65_535;
/// Authentication tag of ChaCha20-Poly1305 (RFC 8439).
pub const TAG_BYTES: usize = 16;
/// Plaintext of one record.
pub const MAX_RECORD_BYTES: usize = MAX_NOISE_BYTES - TAG_BYTES;
/// Payload of one WebSocket message on a data socket: base64 of the largest Noise message, rounded up.
pub const MAX_DATA_FRAME_BYTES: usize = 128 * 1024;
/// Application bytes in one DATA record. Measured: larger ones save no time and delay the others.
pub const MAX_DATA_BYTES: usize = 32 * 1024;
/// DATA records are padded to a multiple of this many bytes.
pub const DATA_PADDING: usize = 16;

/// Receive window of a stream when it opens; it grows with use.
pub const INITIAL_STREAM_WINDOW: u64 = 256 * 1024;
/// The largest receive window of a stream.
pub const MAX_STREAM_WINDOW: u64 = 4 * 1024 * 1024;
/// Receive window of all streams of a channel together: what one peer can make an agent hold.
pub const CHANNEL_WINDOW: u64 = 16 * 1024 * 1024;
/// Streams open at once in one channel, as many as HELLO and WELCOME may list.
pub const MAX_STREAMS: usize = 4096;

/// Streams of a channel that are not for the target, open at once: each costs the exposer a probe of its
/// target or the work of a transfer, so a peer gets a few.
pub const MAX_CHECKS: usize = 4;
/// Bytes that the exposer sends on a source stream: a second or so of a fast path, to measure it.
pub const MAX_SOURCE_BYTES: u64 = 64 * 1024 * 1024;
/// A check report: all its texts and names, each at its longest, fit.
pub const MAX_CHECK_REPORT_BYTES: usize = 4096;
/// One text in it: as long as a name in DNS can be (RFC 1035 section 2.3.4).
pub const MAX_CHECK_TEXT_BYTES: usize = 253;
/// Names of a certificate in it: enough to tell what is wrong.
pub const MAX_CHECK_NAMES: usize = 8;
/// The name of a protocol: `elasticsearch` and longer ones fit.
pub const MAX_PROTOCOL_BYTES: usize = 24;

/// A control socket must authenticate within this time.
pub const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// A half-open handshake is given up after this time; a ticket is valid as long.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Half-open handshakes of one peer at the exposer.
pub const MAX_HALF_OPEN_PER_PEER: usize = 8;
/// Half-open handshakes of all peers at the exposer.
pub const MAX_HALF_OPEN: usize = 256;
/// First handshake messages that an exposer answers in a second.
pub const MAX_FIRST_MESSAGES_PER_SEC: u32 = 100;
/// Tunnel ids that an exposer remembers to refuse a replayed first message.
pub const REMEMBERED_TUNNELS: usize = 65_536;
/// A reacher gives up a channel that has been without a tunnel for this long since its peer was last
/// heard: TCP clients have mostly given up by then too.
pub const PARKED_AT_REACHER: Duration = Duration::from_secs(120);
/// An exposer keeps it longer, so that a late resume gets an answer.
pub const PARKED_AT_EXPOSER: Duration = Duration::from_secs(180);
/// Channels without a tunnel that an exposer keeps for one peer.
pub const MAX_PARKED_PER_PEER: usize = 64;
/// Pings of a quiet tunnel are this far apart, plus jitter.
pub const KEEPALIVE: Duration = Duration::from_secs(15);
/// A tunnel silent for this long is dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(40);
/// Pings of a control socket are this far apart, plus jitter: most agents only wait, and the proxies and
/// address translators on their way forget a quiet connection after 60 s.
pub const CONTROL_KEEPALIVE: Duration = Duration::from_secs(50);
/// The jitter of these pings at most.
pub const CONTROL_JITTER: Duration = Duration::from_secs(5);
/// A control socket silent for this long is dead: a ping, and 20 s for it to come through.
pub const CONTROL_DEAD_AFTER: Duration = Duration::from_secs(75);

/// The keys of a tunnel are replaced after this time.
pub const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Records of one direction under one key: far below what ChaCha20-Poly1305 bears.
pub const REKEY_AFTER_RECORDS: u64 = 1 << 24;
/// Bytes of records of one direction under one key: 64 GiB.
pub const REKEY_AFTER_BYTES: u64 = 64 << 30;
/// A reacher that got no answer to the first message of a rekey begins it again after this time.
pub const REKEY_RETRY: Duration = Duration::from_secs(10);
/// Handshakes begun for one rekey: as many as fit between [`REKEY_AFTER`] and [`MAX_KEY_AGE`].
pub const MAX_REKEY_ATTEMPTS: u8 = 6;
/// Nothing is sent under a key of this age.
pub const MAX_KEY_AGE: Duration = Duration::from_secs(180);
