# Completion in bash for tcplife, tcpaccept, tcpv4connect, tcpchurn and deeptcptracer. All of it comes from what --help
# prints: the options, and what an option takes, by the name of its value.
#
# In zsh, after compinit in ~/.zshrc:
#     autoload -U bashcompinit && bashcompinit && . /usr/share/bash-completion/completions/tcplife
#
# shellcheck shell=bash disable=SC2207

_tcp_tracers() {
    local IFS=$' \t\n' current=$2 option=$3 help line names word kind='' text='' how='' options=() prefix=''
    [[ ! ${ZSH_VERSION:-} ]] || setopt local_options bash_rematch

    # Only root has the tools' directory in PATH, but others type sudo tcplife.
    help=$(PATH=$PATH:/usr/local/sbin:/usr/sbin NO_COLOR=1 COLUMNS=1000 "${1/#\~/$HOME}" --help 2>/dev/null)
    case $option in
    =) option=${COMP_WORDS[COMP_CWORD - 2]} ;;      # --option=value is three words
    -[!-]?*) option=-${option: -1} ;;               # -Tp value
    esac
    [[ $current != = ]] || current=
    case $current in
    --*=*) option=${current%%=*} prefix=$option= current=${current#*=} ;;       # one word in zsh
    esac
    while IFS= read -r line; do                     # "  -p PID, --pid PID  text"
        [[ $line =~ ^'  '(-([^ ]| [^ ])*)(.*) ]] || continue
        names=${BASH_REMATCH[1]}
        for word in ${names//,/ }; do
            [[ $word != -* ]] || options+=("$word")
            [[ $word != "$option" ]] || kind=${names##* } text=${BASH_REMATCH[3]}
        done
    done <<<"${help//$'\n        '/ }"              # an option's text may be on the next line
    if [[ ! $kind || $kind == -* ]]; then           # not after an option that takes a value
        kind=OPTION
        [[ $current == -* || $help != *$'\n  PID '* ]] || kind=PID
    fi

    case $kind in
    OPTION) text=${options[*]} ;;
    PID) text=$(cd /proc && echo [1-9]*) ;;
    NETNS) text=$(ls /run/netns 2>/dev/null) ;;
    PATH | FILE) how=filenames ;;
    \{*) text=${kind//[\{\},]/ } ;;
    LIST)
        how=nospace                                 # a comma may follow
        names=${current%"${current##*,}"} current=${current##*,} text=${text##*:} prefix+=$names
        for word in ${names//,/ }; do               # each but once
            text=" ${text//,/ } "
            text=${text/" $word "/ }
        done
        text=${text//,/ }
        ;;
    *) text= ;;
    esac
    [[ ! $how || ${ZSH_VERSION:-} ]] || compopt -o $how
    [[ $how = filenames ]] && options=(-f) || options=(-W "$text")
    COMPREPLY=($(compgen -P "$prefix" "${options[@]}" -- "$current"))
} && complete -F _tcp_tracers tcplife tcpaccept tcpv4connect tcpchurn deeptcptracer
