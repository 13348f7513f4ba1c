//! The agent's static file as values: what a lab's two agents are told.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::lab::{Lab, Node};
use crate::pod::Pod;

/// The lab's trust domain.
pub const TRUST_DOMAIN: &str = "lab.example";
/// The namespace of every workload, service and policy that [`Mesh`] makes.
pub const NAMESPACE: &str = "shop";

/// The static file; fields left out of it are `None` or empty here.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// `trustDomain`.
    pub trust_domain: String,
    /// `node`.
    pub node: String,
    /// `identity`; [`Mesh`] makes it the embedded source with one CA for both nodes.
    pub identity: Value,
    /// `capture`.
    pub capture: Capture,
    /// `admin`.
    pub admin: Listen,
    /// `metrics`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Listen>,
    /// `timeouts`: names as in the file, values such as `5s`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub timeouts: BTreeMap<String, String>,
    /// `limits`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, u32>,
    /// `workloads`.
    pub workloads: Vec<Workload>,
    /// `peers`.
    pub peers: Vec<Peer>,
    /// `services`.
    pub services: Vec<Service>,
    /// `policies`, each as in the file.
    pub policies: Vec<Value>,
}

/// `capture`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capture {
    /// Ancestor of every pod's cgroup on this node.
    pub cgroup: PathBuf,
    /// Where the agent pins.
    pub bpffs: PathBuf,
    /// As in `15001-15004`; the default where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen_ports: Option<String>,
}

/// `admin` and `metrics`.
#[derive(Clone, Debug, Serialize)]
pub struct Listen {
    /// In the node's network namespace.
    pub listen: SocketAddr,
}

/// An entry of `workloads`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Where its network namespace is mounted.
    pub netns: PathBuf,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// For the embedded source alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    /// Its own source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Value>,
}

/// An entry of `peers`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// The pod's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The ID that it must present.
    pub spiffe_id: String,
    /// Its mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Ports with a mode of their own, each as in the file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Value>,
}

/// An entry of `services`.
#[derive(Clone, Debug, Serialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its virtual addresses; nothing in the lab routes them.
    pub vips: Vec<IpAddr>,
    /// Each as in the file.
    pub ports: Vec<Value>,
    /// The pods behind it.
    pub endpoints: Vec<IpAddr>,
}

impl Config {
    /// The file's text.
    pub fn yaml(&self) -> Result<String> {
        Ok(serde_saphyr::to_string(self)?)
    }

    /// The workload of that name; panics where there is none.
    pub fn workload(&mut self, name: &str) -> &mut Workload {
        let found = self.workloads.iter_mut().find(|workload| workload.name == name);
        found.unwrap_or_else(|| panic!("no workload {name}"))
    }

    /// The peer of that name; panics where there is none.
    pub fn peer(&mut self, name: &str) -> &mut Peer {
        let found = self.peers.iter_mut().find(|peer| peer.name == name);
        found.unwrap_or_else(|| panic!("no peer {name}"))
    }
}

/// What both agents of a lab shall know; each pod is a workload to its own node's agent, and a peer to the other's.
#[derive(Debug)]
pub struct Mesh {
    nodes: [Arc<Node>; 2],
    dir: PathBuf,
    enrolled: Vec<(Arc<str>, Workload)>,
    services: Vec<Service>,
    policies: Vec<Value>,
}

impl Mesh {
    /// Nothing enrolled yet.
    pub fn new(lab: &Lab) -> Self {
        let nodes = [Arc::clone(&lab.a), Arc::clone(&lab.b)];
        Self { nodes, dir: lab.dir(), enrolled: Vec::new(), services: Vec::new(), policies: Vec::new() }
    }

    /// Enrols a pod: `spiffe://lab.example/<name>`, service account `<name>`, label `app: <name>`.
    pub fn enrol(&mut self, pod: &Pod) {
        let workload = Workload {
            name: pod.name.clone(),
            namespace: NAMESPACE.to_owned(),
            service_account: pod.name.clone(),
            labels: BTreeMap::from([("app".to_owned(), pod.name.clone())]),
            netns: pod.netns.path(),
            ips: vec![pod.v4.into(), pod.v6.into()],
            spiffe_id: Some(spiffe_id(&pod.name)),
            identity: None,
        };
        self.enrolled.push((pod.node.name.into(), workload));
    }

    /// A service; `ports` are (port, targetPort).
    pub fn service(&mut self, name: &str, vips: &[&str], ports: &[(u16, u16)], endpoints: &[&Pod]) -> Result<()> {
        let vips = vips.iter().map(|vip| vip.parse()).collect::<Result<_, _>>()?;
        let ports = ports.iter().map(|(port, target)| json!({ "port": port, "targetPort": target })).collect();
        let endpoints = endpoints.iter().flat_map(|pod| [IpAddr::V4(pod.v4), IpAddr::V6(pod.v6)]).collect();
        self.services.push(Service { name: name.to_owned(), namespace: NAMESPACE.to_owned(), vips, ports, endpoints });
        Ok(())
    }

    /// A policy for the pod of that name (by its label `app`); `body` has the file's other fields, as in
    /// `{"listener": {"mode": "STRICT"}}`, and may override `select`.
    pub fn policy(&mut self, app: &str, body: Value) {
        let mut policy = json!({ "name": app, "namespace": NAMESPACE, "select": { "labels": { "app": app } } });
        if let (Some(policy), Value::Object(body)) = (policy.as_object_mut(), body) {
            policy.extend(body);
        }
        self.policies.push(policy);
    }

    /// What this node's agent is told.
    pub fn config(&self, node: &Node) -> Config {
        let (own, others): (Vec<_>, Vec<_>) = self.enrolled.iter().partition(|(at, _)| **at == *node.name);
        Config {
            trust_domain: TRUST_DOMAIN.to_owned(),
            node: node.name.to_owned(),
            identity: json!({ "source": "embedded", "embedded": { "dir": self.dir.join("dev-ca") } }),
            capture: Capture { cgroup: node.pods.clone(), bpffs: node.bpffs.clone(), listen_ports: None },
            admin: Listen { listen: SocketAddr::from(([127, 0, 0, 1], 15000)) },
            metrics: None,
            timeouts: BTreeMap::new(),
            limits: BTreeMap::new(),
            workloads: own.into_iter().map(|(_, workload)| workload.clone()).collect(),
            peers: others.into_iter().map(|(_, workload)| self.peer(workload)).collect(),
            services: self.services.clone(),
            policies: self.policies.clone(),
        }
    }

    /// Starts both agents and waits until they are ready and serve every workload.
    pub fn start(&self) -> Result<(Agent, Agent)> {
        self.start_with(|_| {})
    }

    /// The same, each configuration edited first.
    pub fn start_with(&self, edit: impl Fn(&mut Config)) -> Result<(Agent, Agent)> {
        let configs = self.nodes.each_ref().map(|node| {
            let mut config = self.config(node);
            edit(&mut config);
            config
        });
        let [a, b] = &self.nodes;
        let (first, second) = (Agent::spawn(a, &configs[0])?, Agent::spawn(b, &configs[1])?);
        for (agent, config) in [(&first, &configs[0]), (&second, &configs[1])] {
            agent.wait_ready()?;
            agent.wait_enrolled(config)?;
        }
        Ok((first, second))
    }

    /// What others may know of a workload: its ID, and the mode that its policy gives it.
    fn peer(&self, workload: &Workload) -> Peer {
        let policy = self.policies.iter().find(|policy| policy["name"] == *workload.name);
        let listener = policy.map_or(&Value::Null, |policy| &policy["listener"]);
        let ports = listener["ports"].as_array().into_iter().flatten();
        Peer {
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            ips: workload.ips.clone(),
            spiffe_id: workload.spiffe_id.clone().unwrap_or_else(|| spiffe_id(&workload.name)),
            mode: listener["mode"].as_str().map(str::to_owned),
            ports: ports
                .filter(|p| p["mode"].is_string())
                .map(|p| json!({ "port": p["port"], "mode": p["mode"] }))
                .collect(),
        }
    }
}

/// The ID that a pod of that name has in the lab.
pub fn spiffe_id(name: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/{name}")
}
