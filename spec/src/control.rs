//! The control channel: every message between an agent and the hub, as JSON text frames.
//!
//! PROTOCOL.md, "Control channel". Objects and handshake messages travel as opaque [`Blob`]s: the
//! hub verifies the public ones with `trust`, and can only forward the rest. Unknown fields are
//! ignored, so that a newer peer may say more.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    audit::{ApiKeyId, AuditHead, AuditRow, Scope},
    bytes::{Blob, hex_newtype},
    encoding::Encoding,
    ids::{AgentId, ChannelId, CredentialId, LookupTag, ServiceId, TunnelId, WorkspaceId},
    keys::{IdentityKey, Signature},
    limits::MAX_CONTROL_BYTES,
    log::Head,
    objects::UnixTime,
};

/// Version of the control channel.
pub const CONTROL_VERSION: u8 = 1;
/// Kind of the signature by which an agent logs in.
pub const LOGIN_KIND: &str = "login";
/// Kind of the signature by which the holder of an invite asks for its credential.
pub const REDEEM_KIND: &str = "redeem";
/// Path of the control WebSocket.
pub const AGENT_PATH: &str = "/v1/agent";
/// Path of the data WebSocket.
pub const TUNNEL_PATH: &str = "/v1/tunnel";
/// Scheme of the `Authorization` header that carries a [`Ticket`].
pub const TICKET_SCHEME: &str = "Ticket";

hex_newtype!(
    /// A challenge's randomness, one from the hub and one from the agent.
    Nonce,
    32
);

/// Admits one end of one tunnel to its data socket, once, within ten seconds. A secret.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ticket(String);

impl Ticket {
    /// Spells 256 random bits as hex.
    #[must_use]
    pub fn new(random: [u8; 32]) -> Self {
        Self(hex::encode(random))
    }

    /// Reads a ticket as a header carries it: 64 lower-case hex digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let well_formed = text.len() == 64
            && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
        well_formed.then(|| Self(text.to_owned()))
    }

    /// The text for the `Authorization` header, after [`TICKET_SCHEME`] and a space.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket(..)")
    }
}

/// What an agent signs to log in or to redeem: binds the proof to this hub and this connection.
///
/// `u16 length || authority || hub_nonce 32 || agent_nonce 32 || subject 16 || workspace_id 32`,
/// where the subject is the agent id (login) or the credential id (redeem).
#[must_use]
pub fn proof_text(
    authority: &str,
    hub_nonce: &Nonce,
    agent_nonce: &Nonce,
    subject: &[u8; 16],
    workspace_id: &WorkspaceId,
) -> Vec<u8> {
    let length = u16::try_from(authority.len()).unwrap_or(u16::MAX).to_be_bytes();
    [&length, authority.as_bytes(), &hub_nonce.0, &agent_nonce.0, subject, &workspace_id.0].concat()
}

/// What a control session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionKind {
    /// The agent's own, long-lived session: the newest one displaces the others.
    Agent,
    /// One command's short session beside it.
    Command,
}

/// Objects that an agent shows of itself, as they travel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresentedBlobs {
    /// `Signed<Certificate>`.
    pub certificate: Blob,
    /// `Signed<Credential>`, when the certificate was made under one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<Blob>,
    /// `Signed<NoiseKey>`.
    pub noise_key: Blob,
}

/// Asks for the credential of an invite. Proves possession of the invite key; never carries the code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redeem {
    /// Host and port of the hub as the agent dialled them.
    pub authority: String,
    /// Fresh randomness of the agent.
    pub agent_nonce: Nonce,
    /// The workspace that the invite names.
    pub workspace_id: WorkspaceId,
    /// The key derived from the invite's seed; the credential id follows from it.
    pub invite_key: IdentityKey,
    /// By the invite key, of kind [`REDEEM_KIND`], over [`proof_text`].
    pub signature: Signature,
}

/// Proves who the agent is and shows all that a hub needs to know of it, even a hub that forgot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    /// Host and port of the hub as the agent dialled them.
    pub authority: String,
    /// Fresh randomness of the agent.
    pub agent_nonce: Nonce,
    /// What the session is for.
    pub session: SessionKind,
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The agent's objects.
    #[serde(flatten)]
    pub presented: PresentedBlobs,
    /// `WrapPublicKey`, whose hash the NoiseKey binds.
    pub wrap_key: Blob,
    /// By the identity key, of kind [`LOGIN_KIND`], over [`proof_text`].
    pub signature: Signature,
    /// Creates the workspace: its genesis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create: Option<CreateWorkspace>,
    /// The agent slept or changed its network: sockets of before lead nowhere, and tunnels on them can end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moved: bool,
}

/// The part of a [`Login`] that creates a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateWorkspace {
    /// `Signed<Genesis>`.
    pub genesis: Blob,
    /// What the operator handed out, when registration is not open. A secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registration_token: Option<RegistrationToken>,
}

/// Lets its bearer create one workspace.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegistrationToken(pub String);

impl std::fmt::Debug for RegistrationToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegistrationToken(..)")
    }
}

/// Records that only members can open, with what their sealing binds. PROTOCOL.md, "Names".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedRecord {
    /// The epoch whose name key sealed it.
    pub epoch: u32,
    /// Ascends with each version; a lower one is refused.
    pub counter: u32,
    /// `nonce 24 || ciphertext`.
    pub sealed: Blob,
}

/// M and W, wrapped to one key for one epoch; only its holder can open it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochWrap {
    /// The epoch.
    pub epoch: u32,
    /// `x25519 ephemeral 32 || ml_kem ciphertext 1088 || ciphertext`.
    pub sealed: Blob,
}

/// Everything about a tunnel that both ends and the hub must agree on: the public prologue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelRequest {
    /// Random, chosen by the reacher.
    pub tunnel_id: TunnelId,
    /// The service.
    pub service_id: ServiceId,
    /// The exposer.
    pub responder: AgentId,
    /// Zeros for members, the credential id for guests.
    pub share_id: CredentialId,
    /// The conversation that the tunnel carries on.
    pub channel_id: ChannelId,
    /// Ascends with each tunnel of the channel.
    pub tunnel_no: u32,
    /// How records travel on the data sockets.
    pub encoding: Encoding,
    /// The first handshake message.
    pub message: Blob,
}

/// Agent to hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromAgent {
    /// Before login: answered by `invitation` or `error`.
    Redeem(Redeem),
    /// Answered by `welcome` or `error`.
    Login(Box<Login>),
    /// A request, answered by `reply` with the same id.
    Request {
        /// Chosen by the agent, ascending.
        id: u64,
        /// What is asked.
        request: Request,
    },
    /// The exposer's answer to `incoming_tunnel`, having verified the initiator.
    AcceptTunnel {
        /// The tunnel.
        tunnel_id: TunnelId,
        /// The second handshake message: `ct || Noise message`.
        message: Blob,
    },
    /// The exposer's other answer. A hint to the reacher: the hub could have made it up.
    RefuseTunnel {
        /// The tunnel.
        tunnel_id: TunnelId,
        /// Why.
        code: ErrorCode,
    },
}

/// What a logged-in agent may ask of the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Stores the credential of an invite with its wrap. Signers only.
    CreateCredential {
        /// `Signed<Credential>`.
        credential: Blob,
        /// `WrapPublicKey` of the invite, so that later epochs can be wrapped to it.
        wrap_key: Blob,
        /// M and W for whoever holds the invite.
        wrap: EpochWrap,
    },
    /// Stores the credential of a share. Signers only.
    CreateShare {
        /// `Signed<Credential>`.
        credential: Blob,
        /// The sealed ShareRecord: `nonce 24 || ciphertext`.
        record: Blob,
    },
    /// Publishes the agent's sealed AgentRecord.
    PublishAgent {
        /// The record.
        record: SealedRecord,
    },
    /// Publishes a service; overwrites the agent's own older record of it.
    Expose {
        /// The service.
        service_id: ServiceId,
        /// Where its name is looked up.
        tag: LookupTag,
        /// The sealed ServiceRecord.
        record: SealedRecord,
        /// Whether to take the name from another agent that is offline.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        take_over: bool,
    },
    /// Publishes a service of this agent once more, for the guests of a share that names it.
    ExposeToShare {
        /// The share.
        share_id: CredentialId,
        /// The service.
        service_id: ServiceId,
        /// Where guests look its name up.
        tag: LookupTag,
        /// The ServiceRecord, sealed under the keys of the share.
        record: SealedRecord,
    },
    /// Withdraws a service of this agent.
    Unexpose {
        /// The service.
        service_id: ServiceId,
    },
    /// Finds the services under a tag.
    Lookup {
        /// The tag.
        tag: LookupTag,
    },
    /// Lists services, in ascending order of id.
    Services {
        /// The last id of the page before, absent for the first page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<ServiceId>,
    },
    /// Lists agents, in ascending order of id.
    Agents {
        /// The last id of the page before, absent for the first page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<AgentId>,
    },
    /// Asks an exposer for a tunnel.
    OpenTunnel(TunnelRequest),
    /// Asks for the entries of the trust log after the newest place that the hub has too. Also before
    /// the login, once an invite was redeemed.
    Log {
        /// Places of the own log, newest first: those of [`crate::log::locator`], or none.
        have: Vec<Head>,
    },
    /// Appends entries to the hub's log. The first one must follow the hub's head, or be a recovery
    /// that follows an entry of it: compare and swap.
    Append {
        /// `LogEntry`s, in order.
        entries: Vec<Blob>,
    },
    /// Leaves a beat, if the agent is a witness, and asks for those of others.
    Beats {
        /// `Signed<Beat>`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mine: Option<Blob>,
    },
    /// Asks which agents and open credentials have no wrap of an epoch yet.
    MissingWraps {
        /// The epoch.
        epoch: u32,
    },
    /// Stores wraps of an epoch; one that is there is replaced.
    StoreWraps {
        /// The wraps.
        wraps: Vec<AddressedWrap>,
    },
    /// Asks for this agent's own wrap of an epoch.
    OwnWrap {
        /// The epoch.
        epoch: u32,
    },
    /// Lists the credentials that are not closed, in ascending order of id. Members only.
    Credentials {
        /// The last id of the page before, absent for the first page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<CredentialId>,
    },
    /// Lists the shares among them.
    Shares {
        /// The last id of the page before, absent for the first page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<CredentialId>,
    },
    /// Leaves a new certificate for an agent, which finds it at its next login. Signers only.
    Certify {
        /// `Signed<Certificate>` of a higher serial.
        certificate: Blob,
    },
    /// Reads the audit log, in order. Members only.
    Audit {
        /// The last row of the page before; 0 for the first page.
        after: u64,
        /// Leaves out what is older, in milliseconds since 1970. The rows are no chain then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since: Option<u64>,
    },
    /// Makes a key with which programs read this workspace over HTTP. Members only.
    CreateApiKey {
        /// What it may do.
        scopes: Vec<Scope>,
        /// How long it is valid, in seconds.
        valid_for: u64,
    },
    /// Lists the API keys. Members only.
    ApiKeys,
    /// Ends an API key. Members only.
    RevokeApiKey {
        /// Which.
        key_id: ApiKeyId,
    },
}

/// What a program shows, as `Authorization: Bearer`, to read a workspace over HTTP. A secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ApiKey(String);

impl ApiKey {
    /// How each key begins, so that people and scanners know one when they see it.
    pub const PREFIX: &str = "pck_";

    /// Spells 256 random bits.
    #[must_use]
    pub fn new(random: [u8; 32]) -> Self {
        Self(format!("{}{}", Self::PREFIX, hex::encode(random)))
    }

    /// Reads a key as a header carries it: the prefix and 64 lower-case hex digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Ticket::parse(text.strip_prefix(Self::PREFIX)?)?;
        Some(Self(text.to_owned()))
    }

    /// The text for the `Authorization` header, after `Bearer` and a space.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Whom a wrap is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipient {
    /// An agent.
    Agent(AgentId),
    /// Whoever holds an invite or a share.
    Credential(CredentialId),
}

/// A wrap and whom it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressedWrap {
    /// Whom it is for.
    pub recipient: Recipient,
    /// The wrap.
    pub wrap: EpochWrap,
}

/// Hub to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromHub {
    /// The first message on every control socket.
    Challenge {
        /// [`CONTROL_VERSION`].
        version: u8,
        /// Fresh randomness of the hub.
        nonce: Nonce,
    },
    /// What the holder of an invite needs to make its certificate. Verified by the agent, not believed.
    Invitation {
        /// `Signed<Genesis>`.
        genesis: Blob,
        /// `Signed<Credential>`.
        credential: Blob,
        /// M and W, wrapped to the invite's key; none for a share.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wrap: Option<EpochWrap>,
    },
    /// The login succeeded.
    Welcome {
        /// The hub's head of the trust log: a hint.
        head: Head,
        /// What data sockets may carry.
        encodings: Vec<Encoding>,
        /// Whether an older session of this agent was displaced by this one.
        displaced: bool,
    },
    /// The answer to a request.
    Reply {
        /// Of the request.
        id: u64,
        /// What came of it.
        reply: Reply,
    },
    /// A reacher asks this exposer for a tunnel. Nothing in it is proven but what the handshake proves.
    IncomingTunnel {
        /// Who asks, as the hub says.
        initiator: AgentId,
        /// For what.
        request: TunnelRequest,
        /// For the exposer's data socket, once it has accepted.
        ticket: Ticket,
    },
    /// The trust log has grown: a hint to ask for it.
    LogGrew {
        /// The hub's head.
        head: Head,
    },
    /// A wrap for this agent was stored: a hint to ask for it.
    WrapStored {
        /// Its epoch.
        epoch: u32,
    },
    /// A share was made that names a service of this agent: a hint to ask for the shares.
    ShareMade {
        /// The share.
        share_id: CredentialId,
    },
    /// In place of `welcome`: a signer gave the agent a new certificate, with which it logs in again on
    /// the same socket.
    Renewed {
        /// `Signed<Certificate>`.
        certificate: Blob,
    },
    /// The connection is refused, or ends: the socket closes next.
    Error(ErrorReport),
    /// The hub is about to restart: connect again after the given time.
    Restarting {
        /// Milliseconds to wait before connecting again.
        reconnect_in_ms: u32,
    },
}

/// The hub's answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// A page of services.
    Services {
        /// At most as many as fit a message.
        services: Vec<ListedService>,
        /// Whether more follow after the last.
        more: bool,
    },
    /// A page of agents.
    Agents {
        /// At most as many as fit a message.
        agents: Vec<ListedAgent>,
        /// Whether more follow after the last.
        more: bool,
    },
    /// The exposer accepted the tunnel.
    TunnelAccepted {
        /// The second handshake message: `ct || Noise message`.
        message: Blob,
        /// For the reacher's data socket.
        ticket: Ticket,
    },
    /// A part of the trust log.
    Log {
        /// The newest of the places asked about that the hub has, or the genesis.
        after: Head,
        /// `LogEntry`s that follow it, at most as many as fit a message.
        entries: Vec<Blob>,
        /// Whether more follow after the last.
        more: bool,
    },
    /// Beats of other agents, the newest first.
    Beats {
        /// At most [`crate::limits::MAX_BEATS`].
        beats: Vec<ListedBeat>,
        /// Where the audit log ends: for members to remember, so that what they could have read cannot
        /// be changed behind them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        audit: Option<AuditHead>,
    },
    /// Who has no wrap of an epoch.
    MissingWraps {
        /// Agents, at most as many as fit a message; once they have their wraps, ask again.
        agents: Vec<UnwrappedAgent>,
        /// Open credentials, likewise.
        credentials: Vec<UnwrappedCredential>,
    },
    /// The wrap that was asked for.
    Wrap {
        /// `None`: nobody made it yet.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wrap: Option<EpochWrap>,
    },
    /// A page of credentials.
    Credentials {
        /// At most as many as fit a message.
        credentials: Vec<ListedCredential>,
        /// Whether more follow after the last.
        more: bool,
    },
    /// A part of the audit log.
    Audit {
        /// The last row that was removed for its age.
        base: AuditHead,
        /// The last row.
        head: AuditHead,
        /// At most as many as fit a message.
        rows: Vec<AuditRow>,
        /// Whether more follow after the last.
        more: bool,
    },
    /// A new API key, shown this once.
    ApiKeyCreated {
        /// The key.
        key: ApiKey,
        /// Its id.
        key_id: ApiKeyId,
        /// Until when it is valid.
        expires_at: UnixTime,
    },
    /// The API keys.
    ApiKeys {
        /// All of them, the oldest first.
        keys: Vec<ListedApiKey>,
    },
    /// Not done.
    Error(ErrorReport),
}

/// An API key as the hub knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedApiKey {
    /// Its id.
    pub key_id: ApiKeyId,
    /// Who made it; it ends with that agent.
    pub agent_id: AgentId,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created_at: UnixTime,
    /// Until when it is valid.
    pub expires_at: UnixTime,
    /// When it was last used, to the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<UnixTime>,
}

/// An agent without a wrap, with what must be verified before one is made for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnwrappedAgent {
    /// The agent.
    pub agent_id: AgentId,
    /// Its objects.
    #[serde(flatten)]
    pub presented: PresentedBlobs,
    /// `WrapPublicKey`, whose hash the NoiseKey binds.
    pub wrap_key: Blob,
}

/// A credential without a wrap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnwrappedCredential {
    /// `Signed<Credential>`.
    pub credential: Blob,
    /// `WrapPublicKey`, whose hash the credential binds.
    pub wrap_key: Blob,
}

/// A beat, with what its witness shows of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedBeat {
    /// `Signed<Beat>`.
    pub beat: Blob,
    /// The objects of the witness.
    #[serde(flatten)]
    pub presented: PresentedBlobs,
}

/// A credential as the hub knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedCredential {
    /// `Signed<Credential>`.
    pub credential: Blob,
    /// How many agents joined by it.
    pub used: u32,
    /// The sealed ShareRecord of a share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Blob>,
}

/// A service as the hub knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedService {
    /// The service.
    pub service_id: ServiceId,
    /// Its exposer.
    pub agent_id: AgentId,
    /// The sealed ServiceRecord.
    pub record: SealedRecord,
    /// Whether the exposer has an agent session now.
    pub online: bool,
}

/// An agent as the hub knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedAgent {
    /// The agent.
    pub agent_id: AgentId,
    /// Its objects.
    #[serde(flatten)]
    pub presented: PresentedBlobs,
    /// The sealed AgentRecord, once published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<SealedRecord>,
    /// Whether it has an agent session now.
    pub online: bool,
    /// When it first logged in, as the hub says.
    #[serde(default)]
    pub joined_at: UnixTime,
}

/// Why the hub, or an exposer through it, said no. Shown to people; never believed for trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
    /// The agent that the error is about, such as the other exposer of a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<AgentId>,
    /// When to try again, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u32>,
}

impl ErrorReport {
    /// An error of `code` that says `message`.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), agent_id: None, retry_in_ms: None }
    }

    /// The same, with the time after which it is worth to try again.
    #[must_use]
    pub fn retry_in(mut self, wait: Duration) -> Self {
        // Never so short that the caller comes too early.
        self.retry_in_ms = Some(u32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u32::MAX));
        self
    }
}

/// Codes of the control channel's errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The message is not one of this protocol, or too long, or not expected here.
    BadRequest,
    /// The version is not supported.
    UnsupportedVersion,
    /// The authority signed is not a name of this hub.
    WrongAuthority,
    /// The proof or the objects do not verify.
    Unauthorized,
    /// The workspace is not known here, or does not know the agent.
    UnknownWorkspace,
    /// Creating a workspace needs a valid registration token.
    RegistrationClosed,
    /// The workspace exists already.
    AlreadyExists,
    /// No such invite.
    InviteUnknown,
    /// All uses of the invite are spent.
    InviteUsed,
    /// The invite's time is over.
    InviteExpired,
    /// The same NoiseKey counter with another key: a cloned machine.
    Clone,
    /// A counter went down: the hub knows a newer version.
    Stale,
    /// Other entries were appended to the log meanwhile: fetch them, and try again.
    Conflict,
    /// The agent is revoked.
    Revoked,
    /// The exposer cannot read the newest entries of the trust log.
    UpgradeNeeded,
    /// Another agent exposes a service under this name.
    NameTaken,
    /// No such service, agent or tunnel.
    NotFound,
    /// The exposer has no session now.
    Offline,
    /// The role does not allow it.
    Forbidden,
    /// A limit is reached for now.
    Busy,
    /// Too many in too short a time.
    RateLimited,
    /// The exposer did not answer in time.
    Timeout,
    /// The exposer does not know the issuer of the initiator's certificate.
    IssuerUnknown,
    /// The exposer refused: the handshake, the certificate or the permission did not hold.
    Refused,
    /// A newer session of the same agent took over.
    Displaced,
    /// The hub is restarting.
    Restarting,
    /// The hub failed; its log says why.
    Internal,
    /// A code of a newer version.
    #[serde(other)]
    Unknown,
}

/// Codes with which this project closes a WebSocket, beside those of RFC 6455 section 7.4.
pub mod close {
    /// RFC 6455: done.
    pub const NORMAL: u16 = 1000;
    /// RFC 6455: the endpoint goes away.
    pub const GOING_AWAY: u16 = 1001;
    /// RFC 6455: protocol error.
    pub const PROTOCOL: u16 = 1002;
    /// RFC 6455: a message of a type that cannot be accepted.
    pub const UNSUPPORTED: u16 = 1003;
    /// RFC 6455: a message too big.
    pub const TOO_BIG: u16 = 1009;
    /// The message is not one of this protocol, or not expected here.
    pub const BAD_REQUEST: u16 = 4400;
    /// The proof, the ticket or the objects do not verify.
    pub const UNAUTHORIZED: u16 = 4401;
    /// Not authenticated, or silent, for too long.
    pub const TIMEOUT: u16 = 4408;
    /// The agent, or an end of the tunnel, was revoked.
    pub const REVOKED: u16 = 4403;
    /// A newer session of the same agent took over.
    pub const DISPLACED: u16 = 4409;
    /// The other end of the tunnel is gone.
    pub const PEER_GONE: u16 = 4410;
    /// Somebody of the workspace cut the tunnel, by an API key.
    pub const CUT: u16 = 4411;
    /// A limit is reached.
    pub const BUSY: u16 = 4429;
    /// The hub is restarting.
    pub const RESTARTING: u16 = 4503;
}

/// Why a control message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Longer than [`MAX_CONTROL_BYTES`].
    #[error("longer than {MAX_CONTROL_BYTES} bytes")]
    TooLong,
    /// Not JSON, or no message of this protocol.
    #[error("not a message of this protocol")]
    Malformed,
}

/// Reads a control message.
///
/// # Errors
/// [`ControlError`]; the text is not repeated, since it may hold anything.
pub fn decode<'t, T: Deserialize<'t>>(text: &'t str) -> Result<T, ControlError> {
    if text.len() > MAX_CONTROL_BYTES {
        return Err(ControlError::TooLong);
    }
    serde_json::from_str(text).map_err(|_| ControlError::Malformed)
}

/// Writes a control message.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> String {
    serde_json::to_string(message).expect("control messages have string keys only")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_at_the_limit() {
        let number = |bytes: usize| decode::<u8>(&format!("7{}", " ".repeat(bytes - 1)));
        assert_eq!(number(MAX_CONTROL_BYTES), Ok(7));
        assert_eq!(number(MAX_CONTROL_BYTES + 1), Err(ControlError::TooLong));
    }
}
