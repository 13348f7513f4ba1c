//! Sealane's agent: one proxy per node that gives every enrolled pod SPIFFE mutual TLS.
//!
//! In reading order: the values ([`identity`] to [`snapshot`]), what decides ([`policy`], [`tls`]), what changes anything
//! ([`source`], [`kernel`], [`control`]), and the path of one connection ([`proxy`], top to bottom).
#![deny(unsafe_code)]

pub mod config;
pub mod identity;
pub mod policy;
pub mod snapshot;
pub mod workload;

pub mod svid;
pub mod tls;

pub mod control;
pub mod kernel;
pub mod podnet;
pub mod source;
pub mod sys;
pub mod uninstall;

pub mod admin;
pub mod drain;
pub mod metrics;
pub mod proxy;

pub mod app;
