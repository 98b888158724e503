"""nsl-kdd: network connections, normal or an attack.

Source: Tavallaee et al. 2009, UNB / Canadian Institute for Cybersecurity (redistribution allowed
with citation), the official KDDTrain+_20Percent (25,192) and KDDTest+ (22,544), from the folder
nsl-kdd.

Preprocessing, with constants from the definition of the columns:

* Every attack is class 1. The test part has 18 kinds of attack that this training part
  lacks, which is its purpose: expect a far lower score there than on rows held out here.
* The last column, how many classifiers got the row right, tells about the target: left out.
* Amounts without an upper bound (bytes, seconds, counts of events) become log(1 + amount) / 5;
  counts over the last two seconds are divided by their maximum 511, over the last 100
  connections by 255; rates and flags stay as they are.
* Protocol, service (the 70 of KDD'99) and state are one-hot from fixed lists: 122 inputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples
from atoll.data.sets.columns import Floats, flags, listed, numbers, one_hot, side_by_side
from atoll.data.sets.files import folder_file, read_columns
from atoll.data.tasks import CLASSIFICATION

Table = dict[str, list[str]]

_COLUMNS = listed(
    "duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot "
    "num_failed_logins logged_in num_compromised root_shell su_attempted num_root "
    "num_file_creations num_shells num_access_files num_outbound_cmds is_host_login "
    "is_guest_login count srv_count serror_rate srv_serror_rate rerror_rate srv_rerror_rate "
    "same_srv_rate diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count "
    "dst_host_same_srv_rate dst_host_diff_srv_rate dst_host_same_src_port_rate "
    "dst_host_srv_diff_host_rate dst_host_serror_rate dst_host_srv_serror_rate "
    "dst_host_rerror_rate dst_host_srv_rerror_rate label difficulty"
)
_AMOUNTS = frozenset(
    listed(
        "duration src_bytes dst_bytes wrong_fragment urgent hot num_failed_logins num_compromised "
        "num_root num_file_creations num_shells num_access_files num_outbound_cmds"
    )
)
_MAXIMA = {"count": 511, "srv_count": 511, "dst_host_count": 255, "dst_host_srv_count": 255}
_CATEGORIES = {
    "protocol_type": listed("tcp udp icmp"),
    "service": listed(
        "aol auth bgp courier csnet_ns ctf daytime discard domain domain_u echo eco_i ecr_i efs "
        "exec finger ftp ftp_data gopher harvest hostnames http http_2784 http_443 http_8001 "
        "imap4 IRC iso_tsap klogin kshell ldap link login mtp name netbios_dgm netbios_ns "
        "netbios_ssn netstat nnsp nntp ntp_u other pm_dump pop_2 pop_3 printer private red_i "
        "remote_job rje shell smtp sql_net ssh sunrpc supdup systat telnet tftp_u tim_i time "
        "urh_i urp_i uucp uucp_path vmnet whois X11 Z39_50"
    ),
    "flag": listed("OTH REJ RSTO RSTOS0 RSTR S0 S1 S2 S3 SF SH"),
}
_NOT_INPUTS = {"label", "difficulty", *_CATEGORIES}


def nsl_kdd() -> Dataset:
    """Attacks among network connections."""
    train, test = _table("KDDTrain+_20Percent"), _table("KDDTest+")
    return Dataset(
        name="nsl-kdd",
        x=_inputs(train),
        y=_attacks(train),
        task=CLASSIFICATION,
        classes=2,
        keys={
            "service": np.array(train["service"]),
            "protocol": np.array(train["protocol_type"]),
        },
        test=Examples(_inputs(test), _attacks(test)),
        class_names=("normal", "attack"),
        describe="25,192 network connections to 66 services, normal or an attack",
    )


def _table(name: str) -> Table:
    return read_columns(folder_file("nsl-kdd", f"nsl-kdd/{name}.txt.gz"), _COLUMNS)


def _inputs(table: Table) -> NDArray[np.float32]:
    return side_by_side(
        *(_quantity(table[name], name) for name in _COLUMNS if name not in _NOT_INPUTS),
        *(one_hot(table[name], known, f"nsl-kdd, {name}") for name, known in _CATEGORIES.items()),
    )


def _quantity(column: list[str], name: str) -> Floats:
    values = numbers(column)[:, None]
    return np.log1p(values) / 5 if name in _AMOUNTS else values / _MAXIMA.get(name, 1)


def _attacks(table: Table) -> Floats:
    return 1 - flags(table["label"], "normal")[:, 0]
