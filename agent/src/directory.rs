//! What the hub lists, read with eyes of our own: every record is opened and verified, and one that
//! does not hold is an error or left out, never shown.

use std::{collections::BTreeMap, sync::Arc};

use connect_spec::{
    control::{ListedAgent, ListedService, Reply, Request, SealedRecord, SessionKind},
    ids::{AgentId, Label, ServiceId, ServiceName},
    keys::IdentityKey,
    objects::{AgentRecord, AgentRole, Attributes, ServiceRecord},
    trust::{Presented, VerifiedPeer},
    verify::SafetyNumber,
};
use serde::Serialize;

use crate::{
    clock,
    error::{Error, ErrorKind, Result},
    identity::{Epoch, Identity},
    io::{
        dial::HubUrl,
        hub::{Credentials, Greeted, Session},
    },
    random,
};

/// A session through which one agent asks the hub for names, services and agents.
#[derive(Debug)]
pub struct Directory {
    identity: Arc<Identity>,
    session: Arc<Session>,
}

/// A service whose record and exposer are verified.
#[derive(Debug, Clone)]
pub(crate) struct FoundService {
    pub(crate) record: ServiceRecord,
    pub(crate) exposer: VerifiedPeer,
    pub(crate) online: bool,
}

/// A service, for people.
#[derive(Debug, Clone, Serialize)]
pub struct ServiceInfo {
    /// Its name.
    pub name: ServiceName,
    /// Its id.
    pub service_id: ServiceId,
    /// Its exposer.
    pub agent: AgentId,
    /// What people call the exposer; unique among the listed ones.
    pub label: String,
    /// Whether the exposer is connected to the hub.
    pub online: bool,
    /// `postgres`, `http`, `tcp`, …
    pub protocol: String,
    /// Whether the target answered when the exposer last looked.
    pub target_ok: Option<bool>,
}

/// An agent, for people.
#[derive(Debug, Clone, Serialize)]
pub struct AgentInfo {
    /// Its id.
    pub agent_id: AgentId,
    /// What people call it; unique among the listed ones.
    pub label: String,
    /// `member`, `reacher`, `exposer` or `guest`.
    pub role: &'static str,
    /// Its tags.
    pub tags: Vec<String>,
    /// Whether it is connected to the hub.
    pub online: bool,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// What two people compare: see [`Directory::verify`].
#[derive(Debug, Clone)]
pub struct Verification {
    /// The other agent.
    pub agent_id: AgentId,
    /// The same on both sides, if nobody is in between.
    pub number: SafetyNumber,
}

/// An agent whose certificate holds.
struct FoundAgent {
    info: AgentInfo,
    identity_key: IdentityKey,
}

/// A list that a hub never ends is cut here.
const MAX_LISTED: usize = 100_000;

impl Directory {
    /// Opens a short session of its own, beside that of a running agent.
    ///
    /// # Errors
    /// [`ErrorKind::HubUnreachable`], or what the hub has against this agent.
    pub async fn connect(identity: Arc<Identity>) -> Result<Self> {
        let greeted = Greeted::dial(&HubUrl::parse(&identity.hub)?).await?;
        let credentials = Credentials::of(&identity);
        let (session, _) = greeted.login(&credentials, SessionKind::Command, None).await?;
        Ok(Self::new(identity, Arc::new(session)))
    }

    pub(crate) fn new(identity: Arc<Identity>, session: Arc<Session>) -> Self {
        Self { identity, session }
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Publishes this agent's label and tags, sealed.
    pub(crate) async fn publish_agent(&self, counter: u32) -> Result<()> {
        let identity = &self.identity;
        let epoch = identity.epochs.current();
        let record = identity.signing.sign(&AgentRecord {
            workspace_id: identity.workspace_id(),
            agent_id: identity.agent_id,
            counter,
            epoch: epoch.number,
            label: identity.label.clone(),
            attrs: Attributes::clone(&identity.attrs),
        });
        let record = epoch
            .names
            .seal_agent(&record, &mut random::rng())
            .map_err(|error| Error::new(ErrorKind::Other, error))?;
        self.session().request(Request::PublishAgent { record }).await.map(|_| ())
    }

    /// Finds the service of a name.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`]; [`ErrorKind::TrustViolation`] when the hub shows a record under
    /// the name that does not hold.
    pub(crate) async fn find(&self, name: &ServiceName) -> Result<FoundService> {
        let epochs = &self.identity.epochs;
        let mut services = self.lookup(epochs.current(), name).await?;
        // An exposer that was away since the epoch changed is still listed under the one before.
        if let Some(previous) = epochs.previous().filter(|_| services.is_empty()) {
            services = self.lookup(previous, name).await?;
        }
        let mut found = None;
        for listed in services {
            let service = self.open_service(&listed)?;
            if service.record.name != *name {
                return Err(Error::trust(format_args!(
                    "the hub shows the record of another service under the name `{name}`"
                )));
            }
            // One name has one exposer; of an old one that is gone and a new one, the latter counts.
            if found.as_ref().is_none_or(|other: &FoundService| !other.online && service.online) {
                found = Some(service);
            }
        }
        found.ok_or_else(|| {
            Error::new(ErrorKind::ServiceNotFound, format_args!("no service is called `{name}`"))
                .hint("`connect services` lists what there is")
        })
    }

    async fn lookup(&self, epoch: &Epoch, name: &ServiceName) -> Result<Vec<ListedService>> {
        let tag = epoch.names.tag(name);
        let Reply::Services { services, .. } =
            self.session().request(Request::Lookup { tag }).await?
        else {
            return Err(unexpected_reply());
        };
        Ok(services)
    }

    /// The epoch that a record names. The hub may name any.
    fn epoch_of(&self, record: &SealedRecord) -> Result<&Epoch> {
        self.identity.epochs.get(record.epoch).ok_or_else(|| {
            Error::trust(format_args!(
                "it belongs to epoch {}, which is unknown here",
                record.epoch
            ))
        })
    }

    /// Opens and verifies a listed service.
    fn open_service(&self, listed: &ListedService) -> Result<FoundService> {
        let identity = &self.identity;
        let does_not_hold = |error: &dyn std::fmt::Display| {
            Error::trust(format_args!(
                "the record of service {} does not hold: {error}",
                listed.service_id
            ))
        };
        let record = self
            .epoch_of(&listed.record)
            .map_err(|error| does_not_hold(&error))?
            .names
            .open_service(
                &identity.workspace_id(),
                listed.service_id,
                listed.agent_id,
                &listed.record,
            )
            .map_err(|error| does_not_hold(&error))?;
        let record = record.object().clone();
        let presented = Presented {
            certificate: record.certificate.clone(),
            credential: record.credential.clone(),
            noise_key: record.noise_key.clone(),
        };
        let exposer = identity
            .trust
            .verify_peer(listed.agent_id, presented, clock::now())
            .map_err(|error| {
                Error::trust(format_args!(
                    "the exposer of `{}` is not trusted: {error}",
                    record.name
                ))
            })?;
        if !exposer.certificate().role.may_expose() {
            return Err(Error::trust(format_args!(
                "the agent that exposes `{}` may not expose",
                record.name
            )));
        }
        Ok(FoundService { record, exposer, online: listed.online })
    }

    /// All services of the workspace whose records hold, by name.
    ///
    /// # Errors
    /// As a request to the hub.
    pub async fn services(&self) -> Result<Vec<ServiceInfo>> {
        let labels: BTreeMap<AgentId, String> =
            self.agents().await?.into_iter().map(|agent| (agent.agent_id, agent.label)).collect();
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let Reply::Services { services, more } =
                self.session().request(Request::Services { after }).await?
            else {
                return Err(unexpected_reply());
            };
            let last = services.last().map(|service| service.service_id);
            for listed in services {
                match self.open_service(&listed) {
                    Ok(FoundService { record, online, .. }) => all.push(ServiceInfo {
                        name: record.name,
                        service_id: record.service_id,
                        agent: record.agent_id,
                        label: labels
                            .get(&record.agent_id)
                            .cloned()
                            .unwrap_or_else(|| record.agent_id.short()),
                        online,
                        protocol: record.protocol,
                        target_ok: record.target_ok,
                    }),
                    Err(error) => tracing::warn!(%error, "a service was left out"),
                }
            }
            if !more || last.is_none() || last <= after || all.len() > MAX_LISTED {
                break;
            }
            after = last;
        }
        all.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(all)
    }

    /// All agents of the workspace whose certificates hold, by label.
    ///
    /// # Errors
    /// As a request to the hub.
    pub async fn agents(&self) -> Result<Vec<AgentInfo>> {
        let mut all: Vec<_> =
            self.found_agents().await?.into_iter().map(|agent| agent.info).collect();
        make_labels_unique(&mut all);
        Ok(all)
    }

    /// The number that this agent and another one, named by its id or label, have in common.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when no agent or more than one has the label, or it is this one; as a request
    /// to the hub.
    pub async fn verify(&self, agent: &str) -> Result<Verification> {
        let mut found = self.found_agents().await?;
        match agent.parse::<AgentId>() {
            Ok(id) => found.retain(|found| found.info.agent_id == id),
            // As its owner wrote it: numbers that tell listed agents apart depend on who else is listed.
            Err(_) => found.retain(|found| found.info.label == agent),
        }
        let usage = |message: String| Error::new(ErrorKind::Usage, message);
        let [other] = found.as_slice() else {
            if found.is_empty() {
                return Err(usage(format!("no agent has the label or id `{agent}`"))
                    .hint("`connect agents` lists them"));
            }
            let ids: Vec<_> = found.iter().map(|found| found.info.agent_id.to_string()).collect();
            return Err(usage(format!("{} agents are called `{agent}`", ids.len()))
                .hint(format_args!("say which one by its id: {}", ids.join(", "))));
        };
        let identity = &self.identity;
        if other.info.agent_id == identity.agent_id {
            return Err(usage("that is this agent itself".to_owned())
                .hint("name the agent of the person you compare with"));
        }
        Ok(Verification {
            agent_id: other.info.agent_id,
            number: SafetyNumber::of(
                &identity.workspace_id(),
                &identity.signing.public(),
                &other.identity_key,
            ),
        })
    }

    /// All agents whose certificates hold, with labels as their owners wrote them.
    async fn found_agents(&self) -> Result<Vec<FoundAgent>> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let Reply::Agents { agents, more } =
                self.session().request(Request::Agents { after }).await?
            else {
                return Err(unexpected_reply());
            };
            let last = agents.last().map(|agent| agent.agent_id);
            for listed in agents {
                match self.open_agent(&listed) {
                    Ok(agent) => all.push(agent),
                    Err(error) => tracing::warn!(%error, "an agent was left out"),
                }
            }
            if !more || last.is_none() || last <= after || all.len() > MAX_LISTED {
                break;
            }
            after = last;
        }
        Ok(all)
    }

    fn open_agent(&self, listed: &ListedAgent) -> Result<FoundAgent> {
        let identity = &self.identity;
        let does_not_hold = |what: &dyn std::fmt::Display| {
            Error::trust(format_args!("agent {}: {what}", listed.agent_id.short()))
        };
        let presented =
            Presented::from_blobs(&listed.presented).map_err(|error| does_not_hold(&error))?;
        let peer = identity
            .trust
            .verify_peer(listed.agent_id, presented, clock::now())
            .map_err(|error| does_not_hold(&error))?;
        let record = listed.record.as_ref().map(|record| self.open_agent_record(&peer, record));
        let (label, attrs) = match record.transpose().map_err(|error| does_not_hold(&error))? {
            Some((label, attrs)) => (label.to_string(), attrs.tags),
            None => (listed.agent_id.short(), Vec::new()),
        };
        let role = match peer.certificate().role {
            AgentRole::Member => "member",
            AgentRole::Reacher => "reacher",
            AgentRole::Exposer => "exposer",
            AgentRole::Guest => "guest",
        };
        let info = AgentInfo {
            agent_id: listed.agent_id,
            label,
            role,
            tags: attrs,
            online: listed.online,
            // Entries that revoke come with the trust log; at its genesis nobody is revoked.
            revoked: false,
        };
        Ok(FoundAgent { info, identity_key: peer.identity_key() })
    }

    fn open_agent_record(
        &self,
        peer: &VerifiedPeer,
        record: &SealedRecord,
    ) -> Result<(Label, Attributes)> {
        let identity = &self.identity;
        let record = self
            .epoch_of(record)?
            .names
            .open_agent(&identity.workspace_id(), peer.agent_id(), &peer.identity_key(), record)
            .map_err(Error::trust)?;
        let record = record.object();
        if record.attrs.hash() != peer.certificate().attrs {
            return Err(Error::trust("its tags are not those of its certificate"));
        }
        Ok((record.label.clone(), record.attrs.clone()))
    }
}

fn unexpected_reply() -> Error {
    Error::new(ErrorKind::HubUnreachable, "the hub answers something else than was asked")
        .hint("update the older of the hub and this program")
}

/// `web`, `web-2`, `web-3`: by label, then by id, so that everybody sees the same.
fn make_labels_unique(agents: &mut [AgentInfo]) {
    agents.sort_by(|left, right| (&left.label, left.agent_id).cmp(&(&right.label, right.agent_id)));
    let mut count: BTreeMap<String, u32> = BTreeMap::new();
    for agent in agents {
        let seen = count.entry(agent.label.clone()).or_default();
        *seen += 1;
        if *seen > 1 {
            agent.label = format!("{}-{seen}", agent.label);
        }
    }
}
