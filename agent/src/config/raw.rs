//! The static file as written: one type per mapping, every value with its place, nothing judged yet.
//!
//! Every field may be absent as far as serde is concerned, so that the validation can report all of the missing ones.

use std::collections::BTreeMap;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny};
use serde_saphyr::Spanned;

/// A value that may be absent, but not present without a value: an `allow:` whose entries are all commented out must not
/// widen to the default.
#[derive(Debug)]
pub(super) struct Field<T>(pub(super) Option<Spanned<T>>);

impl<T> Default for Field<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, defined } = Spanned::<Option<T>>::deserialize(deserializer)?;
        let value = value.ok_or_else(|| D::Error::custom("has no value; leave the field out for its default"))?;
        Ok(Self(Some(Spanned { value, referenced, defined })))
    }
}

/// A list whose entries have places of their own.
pub(super) type List<T> = Field<Vec<Spanned<T>>>;

/// Declares mappings: camelCase, unknown fields refused, every field optional.
macro_rules! mappings {
    ($($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        pub(super) struct $name { $($(#[$fmeta])* pub(super) $field: $ty,)* }
    )*};
}

mappings! {
    /// The whole file.
    File {
        trust_domain: Field<String>,
        node: Field<String>,
        identity: Field<Identity>,
        capture: Field<Capture>,
        admin: Field<Listen>,
        metrics: Field<Listen>,
        timeouts: Field<Timeouts>,
        limits: Field<Limits>,
        workloads: List<Workload>,
        peers: List<Peer>,
        services: List<Service>,
        policies: List<Policy>,
    }
    Identity {
        source: Field<String>,
        embedded: Field<Directory>,
        files: Field<Directory>,
        spire: Field<IgnoredAny>,
    }
    Directory {
        dir: Field<String>,
    }
    Capture {
        cgroup: Field<String>,
        bpffs: Field<String>,
        listen_ports: Field<String>,
    }
    Listen {
        listen: Field<String>,
    }
    Timeouts {
        connect: Field<String>,
        handshake: Field<String>,
        svid_wait: Field<String>,
        drain: Field<String>,
        unenrol_grace: Field<String>,
        peek: Field<String>,
        max_connection_age: Field<String>,
    }
    Limits {
        connections_per_pod: Field<String>,
        handshakes_per_pod: Field<String>,
    }
    Workload {
        name: Field<String>,
        namespace: Field<String>,
        service_account: Field<String>,
        labels: Field<BTreeMap<String, String>>,
        netns: Field<String>,
        ips: List<String>,
        spiffe_id: Field<String>,
        selectors: List<IgnoredAny>,
        identity: Field<WorkloadIdentity>,
    }
    WorkloadIdentity {
        source: Field<String>,
        hint: Field<IgnoredAny>,
        id: Field<IgnoredAny>,
    }
    Peer {
        name: Field<String>,
        namespace: Field<String>,
        ips: List<String>,
        spiffe_id: Field<String>,
        mode: Field<String>,
        ports: List<PeerPort>,
    }
    PeerPort {
        port: Field<String>,
        mode: Field<String>,
    }
    Service {
        name: Field<String>,
        namespace: Field<String>,
        vips: List<String>,
        ports: List<ServicePort>,
        endpoints: List<String>,
    }
    ServicePort {
        port: Field<String>,
        target_port: Field<String>,
    }
    Policy {
        name: Field<String>,
        namespace: Field<String>,
        select: Field<Select>,
        listener: Field<Listener>,
        client: Field<IgnoredAny>,
        refuse: Field<Refuse>,
        same_node: Field<String>,
    }
    Select {
        labels: Field<BTreeMap<String, String>>,
        service_account: Field<String>,
    }
    Listener {
        mode: Field<String>,
        fail_open: Field<bool>,
        tls: Field<Tls>,
        ports: List<ListenerPort>,
        allow: List<Allow>,
    }
    Tls {
        min_version: Field<String>,
    }
    ListenerPort {
        port: Field<String>,
        mode: Field<String>,
        #[serde(rename = "appTLS")]
        app_tls: Field<bool>,
        alpn: List<IgnoredAny>,
    }
    Allow {
        from: List<String>,
        ports: List<String>,
    }
    Refuse {
        raw_sockets: Field<bool>,
        udp: Field<bool>,
        net_admin: Field<bool>,
    }
}
