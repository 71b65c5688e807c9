"""Slot values that several generators share."""

from adapters.data.core import Vocab

NAMES = Vocab(
    train=(
        "Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Katya", "Liam",
        "Mei", "Noor", "Oscar", "Paula", "Quentin", "Rosa", "Sven", "Tanya", "Umar", "Vera", "Wendy", "Xavier",
        "Yusuf", "Zoe", "Marta", "Ivan", "Claire", "Dmitri", "Felix", "Hannah", "Omar", "Nadia", "Tom", "Laura",
    ),
    heldout=("Priya", "Gustav", "Leila", "Henrik", "Chiara", "Tobias", "Amara", "Ewan", "Solveig", "Rafael"),
)  # fmt: skip

DAYS = Vocab(
    train=(
        "Monday", "Tuesday", "Wednesday", "Friday", "Saturday",
        "3 March", "12 May", "28 June", "7 September", "19 October", "2 December", "15 April", "30 January",
    ),
    heldout=("Thursday", "Sunday", "5 February", "17 July", "23 August", "11 November", "8 June"),
)  # fmt: skip

TIMES = Vocab(
    train=("9 am", "10:30", "11 am", "2 pm", "3:30 pm", "14:00", "16:15", "noon", "8:45", "5 pm"),
    heldout=("1 pm", "10:15", "15:45", "4:30 pm", "9:20"),
)

AMOUNTS = Vocab(
    train=("$120", "€450", "£89.50", "$1,300", "€2,750", "£640", "$75", "€18.90", "$9,800", "£210"),
    heldout=("$365", "€1,140", "£52.80", "$4,900", "€830", "£27"),
)

CITIES = Vocab(
    train=("Berlin", "Lyon", "Toronto", "Osaka", "Madrid", "Leeds", "Boston", "Vienna", "Nairobi", "Lima"),
    heldout=("Porto", "Denver", "Gdansk", "Bristol", "Hanoi"),
)
