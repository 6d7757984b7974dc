//! The lies that a hub can tell, one by one: what `connect-hostile-hub` tells and what the tests
//! tell are the same.
//!
//! A [`LyingHub`] is a [`HostileRelay`] in front of an honest hub: together they are the hub that
//! lies. Some lies need help from inside the workspace, as a hub with an accomplice or a thief for a
//! friend would have it: [`Help`]. What becomes of a lie is written down as far as the hub can see it:
//! [`Report`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::SocketAddr,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use connect_crypto::{
    epoch::EpochSecrets,
    founding::Founding,
    handshake,
    invite::{Invite, InviteKeys},
    keys::{SigningKey, StaticKeypair, WrapKeypair},
    names::NameKeys,
};
use connect_spec::{
    bytes::Blob,
    control::{
        EpochWrap, FromAgent, FromHub, ListedAgent, ListedService, Reply, Request, SealedRecord,
        SessionKind, Ticket, TunnelRequest,
    },
    ids::{AgentId, CredentialId, ServiceId, ServiceName, TunnelId, WorkspaceId},
    keys::WrapPublicKey,
    log::{Change, Entry, EntryHash, Head, LogEntry},
    objects::{
        AgentRecord, AgentRole, Attributes, Certificate, Credential, CredentialKind, Genesis,
        Issuer, NoiseKey, SUITE_1, ServiceRecord, SignerRole,
    },
    record::{CloseCode, Record, put_trust_entry},
    signed::{Body, Signed},
    trust::Presented,
};
use serde_json::{Value, json};

use crate::{
    client::{Keys, Tunnel, now, prologue, rng, tunnel_request},
    hostile_relay::{HostileRelay, Passing, Session, Verdict},
    hub::Hub,
    random, runtime,
};

/// So often a captured first message is played again.
pub const REPLAYS: usize = 10_000;
const REPLAYED: &str = "a replayed first message";

/// What a lie needs beside the power over the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// It goes further with the keys of a member.
    MaybeAccomplice,
    /// The keys of a member, an owner or a former signer, as it says.
    Accomplice,
    /// The code of an invite.
    Code,
}

macro_rules! lies {
    ($($lie:ident $name:literal $needs:ident $about:literal;)*) => {
        /// A lie.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Lie {
            $(#[doc = $about] $lie,)*
        }

        impl Lie {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$lie,)*];

            /// What it is called.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$lie => $name,)* }
            }

            /// What the hub does.
            #[must_use]
            pub fn about(self) -> &'static str {
                match self { $(Self::$lie => $about,)* }
            }

            /// What it needs.
            #[must_use]
            pub fn needs(self) -> Needs {
                match self { $(Self::$lie => Needs::$needs,)* }
            }
        }
    };
}

lies! {
    ForgedAgent "forged_agent" MaybeAccomplice
        "lists an agent that it made up, answers look-ups with a service of it, and lets it knock at exposers";
    ForgedEntry "forged_entry" Nothing
        "shows an entry of the trust log that its own key signed";
    UnsignedSigner "unsigned_signer" MaybeAccomplice
        "shows entries that make its own key an owner, with every signature but an owner's";
    WrongGenesis "wrong_genesis" Nothing
        "shows who joins the genesis of another workspace";
    LogOlderThanTheInvite "log_older_than_the_invite" Nothing
        "hides the trust log from who joins";
    ForkShownToTwoMembers "fork_shown_to_two_members" Accomplice
        "shows one agent another entry in place of the newest; it is signed by a stolen owner key (the accomplice)";
    MadeUpHead "a_made_up_head" Accomplice
        "lets a member (the accomplice) claim a place in the trust log that does not exist";
    MadeUpLog "a_made_up_log" Accomplice
        "lets a member (the accomplice) show an endless trust log of its own making";
    RevocationWithheld "revocation_withheld" Nothing
        "says `done` to whoever appends to the trust log, and tells nobody";
    RollbackAfterRestart "rollback_after_restart" Nothing
        "acts as if it held no entry of the trust log, whatever it is brought";
    SwappedCertificate "swapped_certificate" Accomplice
        "answers look-ups with the record in which a certificate or a static key was exchanged for the accomplice's";
    AnotherAgentsId "another_agents_id" Nothing
        "answers look-ups with the right record under the id of another agent";
    SwappedTag "swapped_tag" Nothing
        "answers look-ups with the record of another service that it saw";
    InviteReused "invite_reused" Code
        "helps a thief of an invite's code to knock at exposers, however often the invite was used and whenever it expired; closing the invite ends that";
    BackdatedCertificate "backdated_certificate" Accomplice
        "lets an agent knock that a removed signer (the accomplice) certifies now, dated before its removal";
    ReplayedOpenTunnel "replayed_open_tunnel" Nothing
        "plays the first request for a tunnel that passes 10,000 times again";
    StrippedKem "stripped_kem" Nothing
        "takes the ML-KEM ciphertext out of the answers of exposers";
    ManInTheMiddle "man_in_the_middle" Accomplice
        "lists the accomplice in place of every other agent, under their ids and under their labels";
}

impl fmt::Display for Lie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Lie {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let lie = Self::ALL.iter().find(|lie| lie.name() == name);
        lie.copied().ok_or_else(|| format!("no lie is called `{name}`; --list shows them"))
    }
}

/// Help from inside the workspace.
#[derive(Debug, Default)]
pub struct Help {
    /// All keys of one agent.
    pub accomplice: Option<Arc<Keys>>,
    /// The code of an invite.
    pub code: Option<Arc<Invite>>,
    /// Whom the second entry of a fork revokes; otherwise an agent that does not exist.
    pub fork_revokes: Option<AgentId>,
}

/// What came of a lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// It was told.
    Told,
    /// An agent did not believe it, and let that be seen.
    Refused,
    /// An agent acted as if it were true.
    Believed,
}

/// One thing that happened.
#[derive(Debug, Clone)]
pub struct Report {
    /// The lie.
    pub lie: Lie,
    /// What.
    pub what: What,
    /// The agent, where it is known.
    pub agent: Option<AgentId>,
    /// For people.
    pub detail: String,
}

impl Report {
    /// As `connect-hostile-hub` prints it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let what = match self.what {
            What::Told => "told",
            What::Refused => "refused",
            What::Believed => "believed",
        };
        json!({
            "lie": self.lie.name(),
            "what": what,
            "agent": self.agent.map(|agent| agent.to_string()),
            "detail": self.detail,
        })
    }
}

/// How often what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Lies told.
    pub told: usize,
    /// Lies that were seen to be refused.
    pub refused: usize,
    /// Lies that were believed.
    pub believed: usize,
}

type Listener = Box<dyn FnMut(&Report) + Send>;

/// An agent that logged in through the relay.
struct Visitor {
    session: Session,
    agent: AgentId,
    workspace: WorkspaceId,
    presented: Presented,
    kind: SessionKind,
}

/// What the hub sees anyway, and remembers for its lies.
#[derive(Default)]
struct Seen {
    /// By number of the session.
    visitors: BTreeMap<usize, Visitor>,
    /// Who joins: workspaces that an invite was redeemed for.
    joining: BTreeMap<usize, WorkspaceId>,
    /// Requests that are not answered yet, by session and id.
    requests: BTreeMap<(usize, u64), Request>,
    /// Who exposes what.
    services: BTreeMap<ServiceId, AgentId>,
    /// What was listed last.
    listed: BTreeMap<ServiceId, ListedService>,
    /// Credentials with the secrets wrapped to them.
    credentials: BTreeMap<CredentialId, Blob>,
    wraps: BTreeMap<CredentialId, EpochWrap>,
    heads: BTreeMap<WorkspaceId, Head>,
    /// What each genesis says of the first epoch.
    commits: BTreeMap<WorkspaceId, [u8; 32]>,
}

impl Seen {
    fn note_from_agent(&mut self, session: &Session, message: &FromAgent) {
        match message {
            FromAgent::Redeem(redeem) => {
                self.joining.insert(session.number, redeem.workspace_id);
            }
            FromAgent::Login(login) => {
                if let Some(create) = &login.create {
                    self.genesis(&create.genesis);
                }
                if let Ok(presented) = Presented::from_blobs(&login.presented) {
                    if let Some(credential) = &presented.credential {
                        let wire = Blob(credential.encode());
                        self.credentials.insert(credential.object().id(), wire);
                    }
                    let visitor = Visitor {
                        session: session.clone(),
                        agent: presented.certificate.object().agent_id(),
                        workspace: login.workspace_id,
                        presented,
                        kind: login.session,
                    };
                    self.visitors.insert(session.number, visitor);
                }
            }
            FromAgent::Request { id, request } => {
                self.requests.insert((session.number, *id), request.clone());
                if let Request::CreateCredential { credential, wrap, .. } = request
                    && let Ok(signed) = Signed::<Credential>::decode(&credential.0)
                {
                    let id = signed.object().id();
                    self.credentials.insert(id, credential.clone());
                    self.wraps.insert(id, wrap.clone());
                }
                if let (Request::Expose { service_id, .. }, Some(visitor)) =
                    (request, self.visitors.get(&session.number))
                {
                    self.services.insert(*service_id, visitor.agent);
                }
            }
            FromAgent::AcceptTunnel { .. } | FromAgent::RefuseTunnel { .. } => {}
        }
    }

    fn genesis(&mut self, wire: &Blob) {
        if let Ok(genesis) = Signed::<Genesis>::decode(&wire.0) {
            self.commits.insert(WorkspaceId(genesis.hash()), genesis.object().epoch_commit);
        }
    }

    /// Returns the request that a reply answers.
    fn note_from_hub(&mut self, session: &Session, message: &FromHub) -> Option<Request> {
        let workspace = self.workspace(session.number);
        if let (FromHub::Welcome { head, .. } | FromHub::LogGrew { head }, Some(workspace)) =
            (message, workspace)
        {
            self.heads.insert(workspace, *head);
        }
        if let FromHub::Invitation { genesis, credential, wrap } = message
            && let Ok(signed) = Signed::<Credential>::decode(&credential.0)
        {
            self.genesis(genesis);
            self.credentials.insert(signed.object().id(), credential.clone());
            if let Some(wrap) = wrap {
                self.wraps.insert(signed.object().id(), wrap.clone());
            }
        }
        let FromHub::Reply { id, reply } = message else {
            return None;
        };
        if let Reply::Services { services, .. } = reply {
            self.listed.extend(services.iter().map(|listed| (listed.service_id, listed.clone())));
        }
        self.requests.remove(&(session.number, *id))
    }

    fn workspace(&self, session: usize) -> Option<WorkspaceId> {
        let visitor = self.visitors.get(&session).map(|visitor| visitor.workspace);
        visitor.or_else(|| self.joining.get(&session).copied())
    }

    fn agent(&self, session: usize) -> Option<AgentId> {
        self.visitors.get(&session).map(|visitor| visitor.agent)
    }

    /// The newest session of each agent that exposes something, with one of its services.
    fn exposers(&self) -> Vec<(&Visitor, ServiceId)> {
        let mut met = BTreeSet::new();
        let newest = self.visitors.values().rev().filter(|visitor| {
            visitor.kind == SessionKind::Agent && met.insert((visitor.workspace, visitor.agent))
        });
        newest
            .filter_map(|visitor| {
                let mine = self.services.iter().find(|(_, agent)| **agent == visitor.agent);
                mine.map(|(service, _)| (visitor, *service))
            })
            .collect()
    }
}

/// Whom somebody pretends to be, with all that it takes to knock at an exposer.
struct Guise {
    what: &'static str,
    agent_id: AgentId,
    presented: Presented,
    attrs: Attributes,
    signing: SigningKey,
    static_keypair: StaticKeypair,
    epoch: EpochSecrets,
}

/// Keys that nobody vouches for.
struct Fresh {
    signing: SigningKey,
    static_keypair: StaticKeypair,
    wrap_key: WrapPublicKey,
    attrs: Attributes,
}

impl Fresh {
    fn new() -> Self {
        Self {
            signing: SigningKey::generate(&mut rng()),
            static_keypair: StaticKeypair::generate(&mut rng()),
            wrap_key: WrapKeypair::generate(&mut rng()).public(),
            attrs: Attributes::new(bytes(), Vec::new()).expect("no tag is no bad tag"),
        }
    }

    /// Puts the keys into a certificate that names `issuer` and is signed by `by`.
    fn guise(
        self,
        what: &'static str,
        workspace_id: WorkspaceId,
        (issuer, by): (Issuer, &SigningKey),
        credential: Option<Signed<Credential>>,
        epoch: EpochSecrets,
    ) -> Guise {
        let agent_id = AgentId::of(&workspace_id, &self.signing.public());
        let granted = credential.as_ref().map(Signed::object);
        let certificate = by.sign(&Certificate {
            workspace_id,
            identity_key: self.signing.public(),
            role: granted.map_or(AgentRole::Member, |credential| credential.role),
            attrs: granted.map_or_else(|| self.attrs.hash(), |credential| credential.attrs),
            serial: 1,
            not_after: None,
            issuer,
            services: None,
        });
        let noise_key = self.signing.sign(&NoiseKey {
            workspace_id,
            agent_id,
            suite: SUITE_1,
            counter: 1,
            static_key: self.static_keypair.public(),
            wrap_key_hash: self.wrap_key.hash(),
        });
        Guise {
            what,
            agent_id,
            presented: Presented { certificate, credential, noise_key },
            attrs: self.attrs,
            signing: self.signing,
            static_keypair: self.static_keypair,
            epoch,
        }
    }
}

fn bytes<const N: usize>() -> [u8; N] {
    random(N).try_into().expect("as many as asked for")
}

fn copy(epoch: &EpochSecrets) -> EpochSecrets {
    EpochSecrets::from_bytes(epoch.to_bytes())
}

/// Another entry that follows `prev`.
fn entry(workspace_id: WorkspaceId, prev: Head, changes: Vec<Change>) -> Entry {
    Entry {
        workspace_id,
        seq: prev.seq.saturating_add(1),
        prev: prev.hash,
        time: now(),
        changes,
        abandons: Vec::new(),
    }
}

fn revoke(agent_id: AgentId) -> Change {
    Change::RevokeAgent { agent_id, below_serial: None }
}

/// Signed by hands that need not be entitled to it.
fn signed<T: Body>(object: &T, by: &[&SigningKey]) -> Signed<T> {
    let signatures =
        by.iter().flat_map(|key| key.sign(object).signatures().to_vec()).collect::<Vec<_>>();
    Signed::new(object.encode(), signatures).expect("well-formed")
}

/// The hub that lies.
struct Liar {
    hub: SocketAddr,
    /// Itself, for what goes on beside it.
    shared: Weak<Mutex<Liar>>,
    lie: Option<Lie>,
    help: Help,
    seen: Seen,
    /// The key with which the hub signs what it forges.
    own: SigningKey,
    reports: Vec<Report>,
    listener: Listener,
    /// How often each lie was told: those with variants go through them.
    turn: usize,
    /// Entries of the trust log that no agent may believe.
    forged: BTreeSet<EntryHash>,
    /// Sessions whose look-ups were answered with lies.
    misled: BTreeSet<usize>,
    /// Knocks that are not answered yet.
    knocks: BTreeMap<TunnelId, &'static str>,
    /// Entries that whoever appended them believes to be at the hub.
    withheld: BTreeMap<WorkspaceId, Vec<LogEntry>>,
    fork: Option<Fork>,
    /// The tunnel whose first message is played again and again.
    replayed: Option<TunnelId>,
}

/// Two entries for one place.
struct Fork {
    victim: AgentId,
    honest: EntryHash,
    sibling: LogEntry,
}

impl Liar {
    fn report(&mut self, what: What, agent: Option<AgentId>, detail: impl Into<String>) {
        let Some(lie) = self.lie else {
            return;
        };
        let report = Report { lie, what, agent, detail: detail.into() };
        (self.listener)(&report);
        self.reports.push(report);
    }

    fn told(&mut self, session: &Session, detail: impl Into<String>) {
        self.turn += 1;
        let agent = self.seen.agent(session.number);
        self.report(What::Told, agent, detail);
    }

    /// The accomplice, if it is one in this workspace.
    fn accomplice(&self, workspace: WorkspaceId) -> Option<Arc<Keys>> {
        self.help.accomplice.clone().filter(|keys| keys.workspace_id == workspace)
    }

    fn handle_from_agent(&mut self, session: &Session, message: &mut FromAgent) -> Verdict {
        let Some(lie) = self.lie else {
            return Verdict::Forward;
        };
        let agent = self.seen.agent(session.number);
        match message {
            FromAgent::AcceptTunnel { tunnel_id, .. } => {
                let Some(what) = self.knocks.remove(tunnel_id) else {
                    return Verdict::Forward;
                };
                self.report(What::Believed, agent, format!("{what}: the door was opened"));
                Verdict::Drop
            }
            FromAgent::RefuseTunnel { tunnel_id, code } => {
                if let Some(what) = self.knocks.remove(tunnel_id) {
                    if what == REPLAYED {
                        return Verdict::Drop;
                    }
                    self.report(What::Refused, agent, format!("{what}: {code:?}"));
                    return Verdict::Drop;
                }
                if self.replayed == Some(*tunnel_id) { Verdict::Drop } else { Verdict::Forward }
            }
            FromAgent::Login(login) => {
                let misled = matches!(lie, Lie::WrongGenesis | Lie::LogOlderThanTheInvite)
                    && self.misled.contains(&session.number);
                if misled {
                    let workspace = login.workspace_id;
                    self.report(What::Believed, agent, format!("joins workspace {workspace}"));
                }
                Verdict::Forward
            }
            FromAgent::Request { id, request } => {
                let id = *id;
                match self.answer(lie, session, request) {
                    Some(reply) => {
                        self.seen.requests.remove(&(session.number, id));
                        session.tell_agent(&FromHub::Reply { id, reply });
                        Verdict::Drop
                    }
                    None => Verdict::Forward,
                }
            }
            FromAgent::Redeem(_) => Verdict::Forward,
        }
    }

    /// What the lying hub answers by itself; `None` when the honest one is to be asked.
    fn answer(&mut self, lie: Lie, session: &Session, request: &Request) -> Option<Reply> {
        let agent = self.seen.agent(session.number);
        let workspace = self.seen.workspace(session.number)?;
        if let Request::OpenTunnel(_) = request
            && self.misled.contains(&session.number)
        {
            self.report(What::Believed, agent, "asks for a tunnel to what it was shown");
        }
        if let Request::Log { have } = request
            && have.iter().any(|head| self.forged.contains(&head.hash))
        {
            self.report(What::Believed, agent, "has a forged entry in its log");
        }
        match (lie, request) {
            (Lie::RevocationWithheld, Request::Append { entries }) => {
                self.withhold(session, workspace, entries);
                Some(Reply::Done)
            }
            (Lie::RevocationWithheld, Request::Log { have }) => {
                let withheld = self.withheld.get(&workspace)?;
                let known =
                    have.iter().find(|head| withheld.iter().any(|held| held.head() == **head));
                let after = *known?;
                Some(Reply::Log { after, entries: Vec::new(), more: false })
            }
            // The epochs that withheld entries begin are unknown to the honest hub.
            (Lie::RevocationWithheld, Request::MissingWraps { .. }) => {
                Some(Reply::MissingWraps { agents: Vec::new(), credentials: Vec::new() })
            }
            (Lie::RevocationWithheld, Request::StoreWraps { .. }) => Some(Reply::Done),
            (Lie::RevocationWithheld, Request::OwnWrap { .. }) => Some(Reply::Wrap { wrap: None }),
            (Lie::RollbackAfterRestart, Request::Log { have }) => {
                if !have.is_empty() {
                    self.told(session, "the hub has no entry of the log");
                }
                let after = Head::genesis(workspace);
                Some(Reply::Log { after, entries: Vec::new(), more: false })
            }
            (Lie::RollbackAfterRestart, Request::Append { entries }) => {
                let detail = format!("keeps its log, and brings {} entries", entries.len());
                self.report(What::Refused, agent, detail);
                Some(Reply::Done)
            }
            (Lie::ForkShownToTwoMembers, Request::Log { have }) => {
                let fork = self.fork.as_ref().filter(|fork| Some(fork.victim) == agent)?;
                let sibling = fork.sibling.head();
                let after = *have.first().filter(|head| head.seq >= sibling.seq)?;
                let entries = Vec::new();
                have.contains(&sibling).then_some(Reply::Log { after, entries, more: false })
            }
            _ => None,
        }
    }

    /// Takes entries that somebody appends, and keeps them from everybody else.
    fn withhold(&mut self, session: &Session, workspace: WorkspaceId, wires: &[Blob]) {
        let withheld = self.withheld.entry(workspace).or_default();
        let mut news = Vec::new();
        for entry in wires.iter().filter_map(|wire| LogEntry::decode(&wire.0).ok()) {
            if withheld.iter().all(|held| held.hash() != entry.hash()) {
                news.push(entry.head().seq);
                withheld.push(entry);
            }
        }
        if news.is_empty() {
            let agent = self.seen.agent(session.number);
            self.report(What::Refused, agent, "knows what was withheld, and brings it");
        }
        for seq in news {
            self.told(session, format!("entry {seq} is appended; nobody hears of it"));
        }
    }

    fn handle_from_hub(
        &mut self,
        session: &Session,
        message: &mut FromHub,
        asked: Option<&Request>,
    ) -> Verdict {
        let Some(lie) = self.lie else {
            return Verdict::Forward;
        };
        let workspace = self.seen.workspace(session.number);
        match message {
            FromHub::Invitation { genesis, .. } if lie == Lie::WrongGenesis => {
                *genesis = Blob(Founding::create(&mut rng()).genesis.encode());
                self.misled.insert(session.number);
                self.told(session, "the genesis of another workspace");
            }
            // Now the hub has the credential, and with the code that is all that the thief needs.
            FromHub::Invitation { .. } if lie == Lie::InviteReused => self.knock(),
            FromHub::IncomingTunnel { initiator, request, ticket }
                if lie == Lie::ReplayedOpenTunnel && self.replayed.is_none() =>
            {
                self.replay(session, *initiator, request, ticket);
            }
            FromHub::Reply { reply, .. } => {
                if let (Some(asked), Some(workspace)) = (asked, workspace) {
                    self.reply(lie, session, workspace, asked, reply);
                }
                if asked.is_some_and(|asked| matches!(asked, Request::Expose { .. })) {
                    self.service_is_there(session);
                }
            }
            FromHub::Challenge { .. }
            | FromHub::Invitation { .. }
            | FromHub::Welcome { .. }
            | FromHub::IncomingTunnel { .. }
            | FromHub::LogGrew { .. }
            | FromHub::WrapStored { .. }
            | FromHub::ShareMade { .. }
            | FromHub::Renewed { .. }
            | FromHub::Error(_)
            | FromHub::Restarting { .. } => {}
        }
        Verdict::Forward
    }

    fn replay(
        &mut self,
        session: &Session,
        initiator: AgentId,
        request: &TunnelRequest,
        ticket: &Ticket,
    ) {
        self.replayed = Some(request.tunnel_id);
        for number in 0..REPLAYS {
            let mut request = request.clone();
            // Every other time as if it were another tunnel.
            if number % 2 == 1 {
                request.tunnel_id = TunnelId(bytes());
                self.knocks.insert(request.tunnel_id, REPLAYED);
            }
            let ticket = ticket.clone();
            session.tell_agent(&FromHub::IncomingTunnel { initiator, request, ticket });
        }
        self.told(session, format!("one request for a tunnel {REPLAYS} times"));
    }

    fn reply(
        &mut self,
        lie: Lie,
        session: &Session,
        workspace: WorkspaceId,
        asked: &Request,
        reply: &mut Reply,
    ) {
        match reply {
            Reply::Log { after, entries, more } => {
                self.show_log(lie, session, workspace, (*after, entries, more));
            }
            Reply::Services { services, .. } if matches!(asked, Request::Lookup { .. }) => {
                self.show_service(lie, session, workspace, services);
            }
            Reply::Agents { agents, .. } => self.show_agents(lie, session, workspace, agents),
            Reply::TunnelAccepted { message, .. } if lie == Lie::StrippedKem => {
                let ciphertext = message.0.len().min(connect_spec::keys::ML_KEM_768_CT_BYTES);
                if self.turn.is_multiple_of(2) {
                    message.0.drain(..ciphertext);
                    self.told(session, "an answer without a ciphertext");
                } else {
                    message.0[..ciphertext].fill(0);
                    self.told(session, "an answer with a ciphertext of zeros");
                }
            }
            Reply::Done
            | Reply::Services { .. }
            | Reply::TunnelAccepted { .. }
            | Reply::Beats { .. }
            | Reply::Audit { .. }
            | Reply::ApiKeyCreated { .. }
            | Reply::ApiKeys { .. }
            | Reply::MissingWraps { .. }
            | Reply::Wrap { .. }
            | Reply::Credentials { .. }
            | Reply::Error(_) => {}
        }
    }

    fn show_log(
        &mut self,
        lie: Lie,
        session: &Session,
        workspace: WorkspaceId,
        (after, entries, more): (Head, &mut Vec<Blob>, &mut bool),
    ) {
        let last = entries.last().and_then(|wire| LogEntry::decode(&wire.0).ok());
        let head = last.as_ref().map_or(after, LogEntry::head);
        let agent = self.seen.agent(session.number);
        match lie {
            Lie::ForgedEntry if !*more => {
                let forged = entry(workspace, head, vec![revoke(AgentId(bytes()))]);
                let forged = LogEntry::Entry(self.own.sign(&forged));
                self.forged.insert(forged.hash());
                entries.push(Blob(forged.encode()));
                self.told(session, format!("entry {}, signed by the hub", forged.head().seq));
            }
            Lie::UnsignedSigner if !*more => {
                let key = self.own.public();
                let add = Change::AddSigner { key, role: SignerRole::Owner };
                let (forged, how) = self.unsigned(session, &entry(workspace, head, vec![add]));
                let forged = LogEntry::Entry(forged);
                self.forged.insert(forged.hash());
                entries.push(Blob(forged.encode()));
                self.told(session, format!("the hub's key as an owner, {how}"));
            }
            Lie::LogOlderThanTheInvite if agent.is_none() && !entries.is_empty() => {
                let hidden = entries.len();
                entries.clear();
                *more = false;
                self.misled.insert(session.number);
                self.told(session, format!("a log without its last {hidden} entries"));
            }
            Lie::ForkShownToTwoMembers => {
                let (Some(last), Some(agent)) = (last, agent) else {
                    return;
                };
                let known = self.fork.as_ref().map(|fork| (fork.victim, fork.honest));
                if known.is_none() {
                    self.make_fork(workspace, agent, &last);
                }
                let Some(fork) = &self.fork else {
                    return;
                };
                let honest = entries.iter().position(|wire| {
                    LogEntry::decode(&wire.0).is_ok_and(|entry| entry.hash() == fork.honest)
                });
                if let Some(at) = honest.filter(|_| fork.victim == agent) {
                    let sibling = fork.sibling.clone();
                    entries.truncate(at);
                    entries.push(Blob(sibling.encode()));
                    *more = false;
                    let seq = sibling.head().seq;
                    self.told(session, format!("another entry {seq} than to everybody else"));
                }
            }
            Lie::ForgedAgent
            | Lie::ForgedEntry
            | Lie::UnsignedSigner
            | Lie::WrongGenesis
            | Lie::LogOlderThanTheInvite
            | Lie::MadeUpHead
            | Lie::MadeUpLog
            | Lie::RevocationWithheld
            | Lie::RollbackAfterRestart
            | Lie::SwappedCertificate
            | Lie::AnotherAgentsId
            | Lie::SwappedTag
            | Lie::InviteReused
            | Lie::BackdatedCertificate
            | Lie::ReplayedOpenTunnel
            | Lie::StrippedKem
            | Lie::ManInTheMiddle => {}
        }
    }

    /// An entry with every signature that can be had but the right one.
    fn unsigned(&self, session: &Session, entry: &Entry) -> (Signed<Entry>, &'static str) {
        let accomplice = self.accomplice(entry.workspace_id);
        let visitor = self.seen.visitors.get(&session.number);
        match (self.turn % UNSIGNED, accomplice, visitor) {
            (1, Some(accomplice), _) => {
                (signed(entry, &[&accomplice.signing]), "signed by the accomplice")
            }
            (2, Some(accomplice), _) => {
                let by = [&accomplice.signing, &self.own];
                (signed(entry, &by), "signed by the accomplice and the hub")
            }
            (3, _, Some(visitor)) => {
                // Who certified the agent, and how that signed something else.
                let certificate = visitor.presented.certificate.signatures().to_vec();
                let credential = visitor.presented.credential.as_ref();
                let signatures =
                    credential.map_or(certificate, |credential| credential.signatures().to_vec());
                let spliced = Signed::new(entry.encode(), signatures).expect("well-formed");
                (spliced, "with an owner's signature of something else")
            }
            _ => (signed(entry, &[&self.own]), "signed by that key itself"),
        }
    }

    fn make_fork(&mut self, workspace: WorkspaceId, victim: AgentId, honest: &LogEntry) {
        // Who was robbed of its key shall not be the one to notice.
        let Some(owner) = self.accomplice(workspace).filter(|owner| owner.agent_id != victim)
        else {
            return;
        };
        let revoked = self.help.fork_revokes.unwrap_or_else(|| AgentId(bytes()));
        let key = owner.signer.as_ref().unwrap_or(&owner.signing);
        let sibling = key.sign(&entry(workspace, honest.follows(), vec![revoke(revoked)]));
        let sibling = LogEntry::Entry(sibling);
        self.fork = Some(Fork { victim, honest: honest.hash(), sibling });
    }

    /// Answers a look-up.
    fn show_service(
        &mut self,
        lie: Lie,
        session: &Session,
        workspace: WorkspaceId,
        services: &mut Vec<ListedService>,
    ) {
        let accomplice = self.accomplice(workspace);
        let Some(honest) = services.first().cloned() else {
            return;
        };
        let detail = match lie {
            Lie::ForgedAgent => {
                let issuer = (Issuer::Signer(self.own.public()), &self.own);
                let epoch = EpochSecrets::generate(&mut rng());
                let own_names = NameKeys::derive(&epoch.names);
                let guise = Fresh::new().guise("made up", workspace, issuer, None, epoch);
                let names = accomplice.as_ref().map_or(&own_names, |friend| &friend.names);
                *services = vec![Self::forged_service(guise, names, &honest)];
                "a service of an agent that does not exist"
            }
            Lie::InviteReused => {
                let Some(thief) = self.thief(workspace) else {
                    return;
                };
                let names = NameKeys::derive(&thief.epoch.names);
                *services = vec![Self::forged_service(thief, &names, &honest)];
                "a service of the thief"
            }
            Lie::SwappedCertificate => {
                let Some((agent_id, record, how)) =
                    accomplice.and_then(|friend| swapped(&friend, &honest, self.turn))
                else {
                    return;
                };
                (services[0].agent_id, services[0].record) = (agent_id, record);
                how
            }
            Lie::AnotherAgentsId => {
                let others = self.seen.visitors.values().map(|visitor| visitor.agent);
                let another = others.rev().find(|agent| *agent != honest.agent_id);
                services[0].agent_id = another.unwrap_or_else(|| AgentId(bytes()));
                "the right record under another agent's id"
            }
            Lie::SwappedTag => {
                let mut others = self.seen.listed.values();
                let Some(other) = others.find(|other| other.service_id != honest.service_id) else {
                    return;
                };
                *services = vec![other.clone()];
                "the record of another service"
            }
            Lie::ForgedEntry
            | Lie::UnsignedSigner
            | Lie::WrongGenesis
            | Lie::LogOlderThanTheInvite
            | Lie::ForkShownToTwoMembers
            | Lie::MadeUpHead
            | Lie::MadeUpLog
            | Lie::RevocationWithheld
            | Lie::RollbackAfterRestart
            | Lie::BackdatedCertificate
            | Lie::ReplayedOpenTunnel
            | Lie::StrippedKem
            | Lie::ManInTheMiddle => return,
        };
        self.misled.insert(session.number);
        self.told(session, detail);
    }

    /// A service of whoever is behind a guise, in place of an honest one. Its record opens under `names`.
    fn forged_service(guise: Guise, names: &NameKeys, honest: &ListedService) -> ListedService {
        let workspace_id = guise.presented.certificate.object().workspace_id;
        let opened =
            names.open_service(&workspace_id, honest.service_id, honest.agent_id, &honest.record);
        let name = opened.map(|record| record.object().name.clone());
        let service_id = ServiceId(bytes());
        let record = guise.signing.sign(&ServiceRecord {
            workspace_id,
            service_id,
            agent_id: guise.agent_id,
            counter: honest.record.counter,
            epoch: honest.record.epoch,
            name: name.unwrap_or_else(|_| "forged".parse().expect("a name")),
            protocol: "tcp".to_owned(),
            certificate: guise.presented.certificate,
            credential: guise.presented.credential,
            noise_key: guise.presented.noise_key,
            port_hint: None,
            target_ok: Some(true),
        });
        let record = names.seal_service(&record, &mut rng()).expect("it fits");
        ListedService { service_id, agent_id: guise.agent_id, record, online: true }
    }

    fn show_agents(
        &mut self,
        lie: Lie,
        session: &Session,
        workspace: WorkspaceId,
        agents: &mut Vec<ListedAgent>,
    ) {
        if lie == Lie::ForgedAgent {
            let issuer = (Issuer::Signer(self.own.public()), &self.own);
            let epoch = EpochSecrets::generate(&mut rng());
            let guise = Fresh::new().guise("made up", workspace, issuer, None, epoch);
            agents.push(ListedAgent {
                agent_id: guise.agent_id,
                presented: guise.presented.to_blobs(),
                record: None,
                online: true,
                joined_at: now(),
            });
            agents.sort_by_key(|agent| agent.agent_id);
            self.told(session, format!("agent {}, made up", guise.agent_id));
        }
        if lie == Lie::ManInTheMiddle
            && let Some(friend) = self.accomplice(workspace)
        {
            let own = self.seen.agent(session.number);
            let under_ids = self.turn % 2 == 1;
            let mut shown = 0;
            for listed in agents.iter_mut() {
                if Some(listed.agent_id) == own || listed.agent_id == friend.agent_id {
                    continue;
                }
                shown += 1;
                let record = listed.record.take();
                let label = record.and_then(|record| {
                    let presented = Presented::from_blobs(&listed.presented).ok()?;
                    let key = presented.certificate.object().identity_key;
                    let agent = listed.agent_id;
                    friend.names.open_agent(&workspace, agent, &key, &record).ok()
                });
                listed.presented = friend.presented.to_blobs();
                listed.record = label.and_then(|label| {
                    let record = friend.signing.sign(&AgentRecord {
                        workspace_id: workspace,
                        agent_id: friend.agent_id,
                        counter: u32::try_from(now()).unwrap_or(u32::MAX),
                        epoch: friend.epoch_number,
                        label: label.object().label.clone(),
                        attrs: friend.attrs.clone(),
                    });
                    friend.names.seal_agent(&record, &mut rng()).ok()
                });
                if !under_ids {
                    listed.agent_id = friend.agent_id;
                }
            }
            let under = if under_ids { "ids" } else { "labels" };
            self.told(session, format!("the accomplice under the {under} of {shown} agents"));
        }
    }

    /// An agent exposes something from now on: whoever wants to knock there can.
    fn service_is_there(&mut self, session: &Session) {
        let number = session.number;
        let is_agent =
            self.seen.visitors.get(&number).is_some_and(|v| v.kind == SessionKind::Agent);
        if is_agent {
            self.knock();
        }
    }

    /// Lets whoever the lie helps knock at every exposer.
    fn knock(&mut self) {
        let exposers: Vec<_> = self
            .seen
            .exposers()
            .into_iter()
            .map(|(visitor, service)| {
                let key = visitor.presented.noise_key.object().static_key;
                (visitor.session.clone(), visitor.agent, visitor.workspace, service, key)
            })
            .collect();
        for (session, exposer, workspace, service, static_key) in exposers {
            for guise in self.guises(workspace, exposer) {
                let mut request = tunnel_request(service, exposer);
                let head = self.seen.heads.get(&workspace).copied();
                let local = handshake::Local {
                    static_keypair: &guise.static_keypair,
                    presented: &guise.presented,
                    attrs: &guise.attrs,
                    head: head.unwrap_or_else(|| Head::genesis(workspace)),
                    realm_secret: &guise.epoch.realm,
                };
                let prologue = prologue(workspace, guise.agent_id, &request);
                let begun = handshake::initiate(&local, &prologue, &static_key, &mut rng());
                let Ok((_, message)) = begun else {
                    continue;
                };
                request.message = Blob(message);
                self.knocks.insert(request.tunnel_id, guise.what);
                let ticket = Ticket::new(bytes());
                let initiator = guise.agent_id;
                session.tell_agent(&FromHub::IncomingTunnel { initiator, request, ticket });
                self.told(&session, format!("knocks: {}", guise.what));
            }
            if let Some(lie @ (Lie::MadeUpHead | Lie::MadeUpLog)) = self.lie
                && let Some(friend) = self.accomplice(workspace)
            {
                self.told(&session, "a tunnel whose other end claims a made-up head");
                let (hub, liar) = (self.hub, self.shared.clone());
                runtime().spawn(async move {
                    let entries = if lie == Lie::MadeUpLog { usize::MAX } else { 0 };
                    let closed = claim_made_up_head(hub, &friend, service, entries).await;
                    // One page has to be read before it can be found out.
                    let refused = Claimed { pages: 1, closed: Some(CloseCode::Forbidden) };
                    let what = if closed == Ok(refused) { What::Refused } else { What::Believed };
                    // Gone with the hub that lies.
                    if let Some(liar) = liar.upgrade() {
                        let mut liar = liar.lock().unwrap_or_else(PoisonError::into_inner);
                        liar.report(what, Some(exposer), format!("{closed:?}"));
                    }
                });
            }
        }
    }

    /// Who knocks, by the lie that is told.
    fn guises(&self, workspace: WorkspaceId, exposer: AgentId) -> Vec<Guise> {
        let made_up = || EpochSecrets::generate(&mut rng());
        let own = |issuer| (issuer, &self.own);
        match self.lie {
            Some(Lie::ForgedAgent) => {
                let issuer = own(Issuer::Signer(self.own.public()));
                let what = "certified by the hub";
                let mut guises = vec![Fresh::new().guise(what, workspace, issuer, None, made_up())];
                let of = |visitor: &&Visitor| visitor.workspace == workspace;
                for visitor in self.seen.visitors.values().filter(of) {
                    let shown = &visitor.presented;
                    let (what, issuer) = match shown.certificate.object().issuer {
                        Issuer::Signer(key) => ("as if a signer had", Issuer::Signer(key)),
                        Issuer::Credential(hash) => {
                            ("as if by a member's invite", Issuer::Credential(hash))
                        }
                    };
                    if guises.iter().all(|guise| guise.what != what) {
                        let credential = shown.credential.clone();
                        let fresh = Fresh::new();
                        let issuer = own(issuer);
                        guises.push(fresh.guise(what, workspace, issuer, credential, made_up()));
                    }
                }
                guises
            }
            Some(Lie::InviteReused) => self.thief(workspace).into_iter().collect(),
            Some(Lie::BackdatedCertificate) => self
                .accomplice(workspace)
                .filter(|friend| friend.agent_id != exposer)
                .map(|friend| backdated(&friend))
                .unwrap_or_default(),
            Some(
                Lie::ForgedEntry
                | Lie::UnsignedSigner
                | Lie::WrongGenesis
                | Lie::LogOlderThanTheInvite
                | Lie::ForkShownToTwoMembers
                | Lie::MadeUpHead
                | Lie::MadeUpLog
                | Lie::RevocationWithheld
                | Lie::RollbackAfterRestart
                | Lie::SwappedCertificate
                | Lie::AnotherAgentsId
                | Lie::SwappedTag
                | Lie::ReplayedOpenTunnel
                | Lie::StrippedKem
                | Lie::ManInTheMiddle,
            )
            | None => Vec::new(),
        }
    }

    /// An agent that joins by a code, with a hub that does not count.
    fn thief(&self, workspace: WorkspaceId) -> Option<Guise> {
        let invite = self.help.code.as_ref().filter(|code| code.workspace_id == workspace)?;
        let keys = InviteKeys::derive(&invite.seed);
        let id = CredentialId::of(&keys.signing.public());
        let credential = self.seen.credentials.get(&id)?;
        let credential = Signed::<Credential>::decode(&credential.0).ok()?;
        // Without the secrets it gets through the door, but no further.
        let opened = self.seen.wraps.get(&id).and_then(|wrap| {
            let commit = self.seen.commits.get(&workspace)?;
            EpochSecrets::open(wrap, &workspace, &keys.wrap, commit).ok()
        });
        let epoch = opened.unwrap_or_else(|| EpochSecrets::generate(&mut rng()));
        let issuer = (Issuer::Credential(credential.hash()), &keys.signing);
        let fresh = Fresh { attrs: invite.attributes().ok()?, ..Fresh::new() };
        let what = "by the code of an invite";
        Some(fresh.guise(what, workspace, issuer, Some(credential), epoch))
    }
}

/// Agents that a former signer certifies, dated when it was one.
fn backdated(friend: &Keys) -> Vec<Guise> {
    let key = friend.signer.as_ref().unwrap_or(&friend.signing);
    let direct = Fresh::new().guise(
        "certified by a removed signer",
        friend.workspace_id,
        (Issuer::Signer(key.public()), key),
        None,
        copy(&friend.epoch),
    );
    let invite = SigningKey::generate(&mut rng());
    let fresh = Fresh::new();
    let long_ago = now().saturating_sub(30 * 24 * 3600);
    let credential = key.sign(&Credential {
        workspace_id: friend.workspace_id,
        kind: CredentialKind::Invite,
        invite_key: invite.public(),
        role: AgentRole::Member,
        attrs: fresh.attrs.hash(),
        services: None,
        uses: 1,
        join_until: long_ago,
        certs_end: long_ago.saturating_add(90 * 24 * 3600),
        issuer: key.public(),
        wrap_key_hash: WrapKeypair::generate(&mut rng()).public().hash(),
    });
    let by_invite = fresh.guise(
        "by a removed signer's invite of last month",
        friend.workspace_id,
        (Issuer::Credential(credential.hash()), &invite),
        Some(credential),
        copy(&friend.epoch),
    );
    vec![direct, by_invite]
}

/// Ways to exchange parts of a record.
pub const SWAPS: usize = 6;
/// Ways to sign an entry without being entitled to it.
pub const UNSIGNED: usize = 4;

/// The record of a service, with parts exchanged for those of a member.
fn swapped(
    friend: &Keys,
    honest: &ListedService,
    turn: usize,
) -> Option<(AgentId, SealedRecord, &'static str)> {
    let opened = friend
        .names
        .open_service(&friend.workspace_id, honest.service_id, honest.agent_id, &honest.record)
        .ok()?;
    let mut record = opened.object().clone();
    let shown = &friend.presented;
    let how = match turn % SWAPS {
        0 => {
            record.certificate = shown.certificate.clone();
            "the accomplice's certificate"
        }
        1 => {
            record.noise_key = shown.noise_key.clone();
            "the accomplice's static key"
        }
        2 => {
            record.certificate = shown.certificate.clone();
            record.credential = shown.credential.clone();
            record.noise_key = shown.noise_key.clone();
            "all objects of the accomplice"
        }
        3 => "the accomplice's signature under the right record",
        4 => {
            record.agent_id = friend.agent_id;
            record.certificate = shown.certificate.clone();
            record.credential = shown.credential.clone();
            "the accomplice as the exposer, with the right static key"
        }
        _ => {
            record.agent_id = friend.agent_id;
            record.noise_key = shown.noise_key.clone();
            "the accomplice as the exposer, with the right certificate"
        }
    };
    // It belongs to the place where it is listed, but for the last two.
    let agent_id = record.agent_id;
    let record = friend.signing.sign(&record);
    Some((agent_id, friend.names.seal_service(&record, &mut rng()).ok()?, how))
}

/// What became of a made-up claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claimed {
    /// How many pages of the made-up log were asked for.
    pub pages: usize,
    /// With which word the tunnel was closed.
    pub closed: Option<CloseCode>,
}

/// Nobody asks for so many pages.
const MAX_PAGES: usize = 100;

/// Opens a tunnel as a member whose trust log goes on where nobody's does, and shows as many entries of it.
///
/// # Errors
/// Why there was no tunnel.
pub async fn claim_made_up_head(
    hub: SocketAddr,
    friend: &Keys,
    service: ServiceId,
    entries: usize,
) -> Result<Claimed, String> {
    let tunnel = Tunnel::open(hub, friend, service, made_up_head()).await?;
    Ok(show_made_up_log(tunnel, friend, entries).await)
}

/// As [`claim_made_up_head`], by a member that exposes a service of this name and is reached.
///
/// # Errors
/// Why there was no tunnel.
pub async fn claim_made_up_head_as_exposer(
    hub: SocketAddr,
    friend: &Keys,
    name: &ServiceName,
    entries: usize,
) -> Result<Claimed, String> {
    let tunnel = Tunnel::answer_one(hub, friend, name, made_up_head()).await?;
    Ok(show_made_up_log(tunnel, friend, entries).await)
}

fn made_up_head() -> Head {
    Head { seq: u64::from(u32::MAX), hash: EntryHash(bytes()) }
}

async fn show_made_up_log(mut tunnel: Tunnel, friend: &Keys, entries: usize) -> Claimed {
    tunnel.send(&Record::Ready).await;
    let mut pages = 0;
    let mut last = Head::genesis(friend.workspace_id);
    while let Some(record) = tunnel.read().await {
        match Record::decode(&record) {
            Ok(Record::TrustGet(_)) if pages < MAX_PAGES => {
                pages += 1;
                let mut page = Vec::new();
                for _ in 0..entries {
                    let next = entry(friend.workspace_id, last, vec![revoke(AgentId(bytes()))]);
                    let next = LogEntry::Entry(friend.signing.sign(&next));
                    if !put_trust_entry(&mut page, &next.encode()) {
                        break;
                    }
                    last = next.head();
                }
                let more = !page.is_empty();
                tunnel.send(&Record::Trust { more, entries: &page }).await;
            }
            Ok(Record::TunnelClose(code)) => return Claimed { pages, closed: Some(code) },
            Ok(_) | Err(_) => {}
        }
    }
    Claimed { pages, closed: None }
}

/// A hub that lies as it is told.
#[derive(Debug)]
pub struct LyingHub {
    relay: HostileRelay,
    liar: Shared,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Liar>>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Liar(..)")
    }
}

impl Shared {
    fn new(hub: SocketAddr, listener: Listener) -> Self {
        Self(Arc::new_cyclic(|shared| {
            Mutex::new(Liar {
                hub,
                shared: shared.clone(),
                lie: None,
                help: Help::default(),
                seen: Seen::default(),
                own: SigningKey::generate(&mut rng()),
                reports: Vec::new(),
                listener,
                turn: 0,
                forged: BTreeSet::new(),
                misled: BTreeSet::new(),
                knocks: BTreeMap::new(),
                withheld: BTreeMap::new(),
                fork: None,
                replayed: None,
            })
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Liar> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, session: Option<&Session>, passing: Passing<'_>) -> Verdict {
        let Some(session) = session else {
            return Verdict::Forward;
        };
        let mut liar = self.lock();
        match passing {
            Passing::ToHub(message) => {
                liar.seen.note_from_agent(session, message);
                liar.handle_from_agent(session, message)
            }
            Passing::ToAgent(message) => {
                let asked = liar.seen.note_from_hub(session, message);
                liar.handle_from_hub(session, message, asked.as_ref())
            }
            Passing::Data(_) => Verdict::Forward,
        }
    }
}

impl LyingHub {
    /// In front of the hub of a test; honest until it is told to lie. Records the wire.
    #[must_use]
    pub fn before(hub: &Hub) -> Self {
        let liar = Shared::new(hub.address(), Box::new(|_| ()));
        let rule = liar.clone();
        let relay =
            HostileRelay::with_sessions(hub, move |session, passing| rule.judge(session, passing));
        Self { relay, liar }
    }

    /// In front of any hub; `listener` hears of everything that comes of the lie.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn listen(
        listen: SocketAddr,
        hub: SocketAddr,
        listener: impl FnMut(&Report) + Send + 'static,
    ) -> io::Result<Self> {
        let liar = Shared::new(hub, Box::new(listener));
        let rule = liar.clone();
        let judge =
            move |session: Option<&Session>, passing: Passing<'_>| rule.judge(session, passing);
        let relay = HostileRelay::listen(listen, hub, judge).await?;
        Ok(Self { relay, liar })
    }

    /// Lies from here on.
    pub fn tell(&self, lie: Lie, help: Help) {
        let mut liar = self.liar.lock();
        liar.lie = Some(lie);
        liar.help = help;
        liar.turn = 0;
        liar.reports.clear();
        liar.misled.clear();
        // Whoever is online looks at the log.
        for visitor in liar.seen.visitors.values() {
            let head = Head { seq: u64::MAX, hash: EntryHash(bytes()) };
            visitor.session.tell_agent(&FromHub::LogGrew { head });
        }
    }

    /// Is honest from here on.
    pub fn be_honest(&self) {
        let mut liar = self.liar.lock();
        liar.lie = None;
        liar.misled.clear();
    }

    /// Lets whoever the lie helps knock at all exposers again.
    pub fn knock(&self) {
        self.liar.lock().knock();
    }

    /// What came of the lie that is told.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        self.liar.lock().reports.clone()
    }

    /// How often what came of it.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for report in &self.liar.lock().reports {
            match report.what {
                What::Told => summary.told += 1,
                What::Refused => summary.refused += 1,
                What::Believed => summary.believed += 1,
            }
        }
        summary
    }

    /// For `connect init --hub`.
    #[must_use]
    pub fn url(&self) -> String {
        self.relay.url()
    }

    /// Everything that passed until now; nothing unless it stands before the hub of a test.
    #[must_use]
    pub fn recorded(&self) -> Vec<u8> {
        self.relay.recorded()
    }
}
