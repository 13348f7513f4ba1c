//! The closed set of reasons: one enum gives the metric label, the log text and the CLI's words, in kernel and agent.

macro_rules! reasons {
    ($($(#[$meta:meta])* $name:ident = $label:literal, $words:literal;)*) => {
        /// Why a connection was refused, ended early, or left alone.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Reason { $(#[doc = $words] $(#[$meta])* $name,)* }

        impl Reason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The metric label and the log field.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// The words for a person.
            pub const fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)* }
            }
        }
    };
}

reasons! {
    // What the kernel programs decide and count; the numbers index the EVENTS map, so these come first.
    Captured = "captured", "an enrolled pod's connection to the mesh was handed to the agent";
    NotMesh = "not_mesh", "the destination is not the mesh's: left on the kernel's path";
    MarkChange = "mark_change", "the pod tried to change the mark of a captured socket";
    OptionRefused = "option_refused", "the pod tried to set an option that would undo the capture";
    MarkFailed = "mark_failed", "the kernel refused to mark a connection to the mesh";
    AgentPort = "agent_port", "somebody dialled the agent's own listener";
    ForeignSource = "foreign_source", "a captured connection has a source that is not the pod's";
    UnknownLocal = "unknown_local", "the destination address is not configured in the pod";
    NotListening = "not_listening", "nothing listens on that port";
    NoListener = "no_listener", "the agent is not there";

    // Ours: identity and configuration.
    IdentityPending = "identity_pending", "the workload has no SVID yet";
    IdentityWithdrawn = "identity_withdrawn", "the workload's SVID was withdrawn";
    SvidExpired = "svid_expired", "the workload's own SVID has expired";
    UnknownWorkload = "unknown_workload", "the pod is not enrolled any more";
    UnknownDestination = "unknown_destination", "the destination is not the mesh's any more";
    NoEndpoint = "no_endpoint", "the service has no endpoint for this port and address family";
    PeerConflict = "peer_conflict", "two workloads claim the destination's address";

    // Dialling.
    ConnectRefused = "connect_refused", "the destination refused the connection";
    ConnectTimeout = "connect_timeout", "the destination did not answer in time";
    ConnectUnreachable = "connect_unreachable", "no route to the destination";
    NoLocalPort = "no_local_port", "no free local port towards the destination";
    ConnectFailed = "connect_failed", "the dial failed for another reason";
    LoopDetected = "loop_detected", "the connection would lead back into the agent";

    // TLS: what the peer sent.
    NotTls = "not_tls", "the peer does not speak TLS";
    TlsVersion = "tls_version", "the peer offers no TLS version that the policy allows";
    TlsParameters = "tls_parameters", "no cipher suite, group or signature in common";
    TlsMisbehaved = "tls_misbehaved", "the peer broke the TLS protocol";
    HandshakeTimeout = "handshake_timeout", "the handshake did not end in time";
    HandshakeClosed = "handshake_closed", "the peer closed the connection during the handshake";
    RefusedByPeer = "refused_by_peer", "the peer refused us with a TLS alert";
    CertificateMissing = "certificate_missing", "the peer sent no certificate";
    CertificateMalformed = "certificate_malformed", "the peer's certificate cannot be parsed";
    CertificateExpired = "certificate_expired", "the peer's certificate has expired";
    CertificateNotYetValid = "certificate_not_yet_valid", "the peer's certificate is not valid yet";
    CertificateUntrusted = "certificate_untrusted", "the peer's certificate leads to no root of its trust domain";
    CertificateIsCa = "certificate_is_ca", "the peer's certificate is a signing certificate";
    CertificateNotLeaf = "certificate_not_leaf", "the peer's certificate does not say that it is an end-entity certificate";
    CertificateKeyUsage = "certificate_key_usage", "the peer's certificate lacks the key usage of an SVID";
    CertificateExtendedUsage = "certificate_extended_usage", "the peer's certificate is not for TLS client and server use";
    CertificateSignature = "certificate_signature", "a signature in the peer's certificate chain is wrong";
    SpiffeIdMissing = "spiffe_id_missing", "the peer's certificate has no URI SAN";
    SpiffeIdAmbiguous = "spiffe_id_ambiguous", "the peer's certificate has more than one URI SAN";
    SpiffeIdMalformed = "spiffe_id_malformed", "the peer's URI SAN is not a SPIFFE ID of a workload";
    TrustDomainUnknown = "trust_domain_unknown", "the workload trusts no bundle of the peer's trust domain";
    PeerIdMismatch = "peer_id_mismatch", "the server's SPIFFE ID is not the one expected";

    // Policy.
    NotAllowed = "not_allowed", "no rule allows the peer's SPIFFE ID on this port";

    // An open connection that ends before its time.
    PolicyChanged = "policy_changed", "the policy no longer allows the connection";
    IdentityChanged = "identity_changed", "the workload's SPIFFE ID changed or was withdrawn";
    BundleChanged = "bundle_changed", "the peer's chain leads to no root of today's bundle";
    MaxAge = "max_age", "the connection reached maxConnectionAge";
    AppReset = "app_reset", "the application reset the connection";
    PeerReset = "peer_reset", "the peer reset the connection";
    PeerTruncated = "peer_truncated", "the peer's stream ended without close_notify";
    Draining = "draining", "the agent ended and the drain bound has passed";
    Unenrolled = "unenrolled", "the pod was unenrolled and the drain bound has passed";
    Aborted = "aborted", "the agent gave the connection up";

    // Limits.
    ConnectionLimit = "connection_limit", "the pod has too many open connections";
    HandshakeLimit = "handshake_limit", "the pod has too many handshakes under way";
}

impl Reason {
    /// How many of [`Self::ALL`] the kernel programs count.
    pub const KERNEL: u32 = Self::NoListener as u32 + 1;
}

impl core::fmt::Display for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.words())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn labels_are_unique_and_numbers_follow_the_list() {
        let labels: HashSet<_> = Reason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), Reason::ALL.len());
        assert!(Reason::ALL.iter().enumerate().all(|(n, r)| *r as usize == n));
    }
}
